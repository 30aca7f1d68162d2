"""Adapters inside sharded checkpoints, and what else of the base training has changed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.errors import UserError
from launcher.export.gathered import (
    SAME_NAMES,
    Assembled,
    Config,
    Options,
    Tensors,
    naming_of,
    with_vocabulary,
    without_twin,
)
from launcher.export.merge import Adapter, read_adapter, split
from launcher.export.merge.adapter import PREFIX, plain_name
from launcher.export.merge.edits import same_values
from launcher.export.merge.settings import is_saved
from launcher.export.merge.ties import HEAD
from launcher.export.names import Naming
from launcher.export.readers.found import Found
from launcher.export.source import Source, read_json
from launcher.export.tensor import Tensor

# What bitsandbytes keeps beside a quantised weight: the base has the weight itself.
QUANTISED = r".+\.(absmax|quant_map|nested_\w+|quant_state\..+|SCB|weight_format)"
LISTED = 5  # names in a message


@dataclass(frozen=True)
class Frozen:
    """What adapters go onto: tensors by their names in memory."""

    tensors: Tensors
    config: Config
    naming: Naming | None  # None: the names on disk are the same
    altered: frozenset[str] = (
        frozenset()
    )  # of `tensors`: not the base folder's but the checkpoint's
    notes: tuple[str, ...] = ()


def adapter_within(source: Source, inside: dict[str, Tensors]) -> Adapter:
    """The adapter of a sharded checkpoint of a PEFT model. Raises UserError when there are several,
    or its configuration is not known."""
    if len(inside) > 1:
        raise UserError(
            f"{source.path} holds {len(inside)} adapters ({', '.join(inside)}); export one of them "
            "with PEFT first"
        )
    if source.adapter_config is None:
        raise UserError(
            f"{source.path} holds LoRA tensors and no adapter_config.json is beside it: rank and "
            "alpha are not known; copy the one of the training there"
        )
    (tensors,) = inside.values()
    return Adapter(source.path, read_json(source.adapter_config), tensors)


def frozen_within(
    source: Source,
    base: Tensors,
    found: Found,
    live: Tensors,
    adapter: Adapter,
    config: Config,
    options: Options,
) -> Frozen:
    """The base folder's tensors with those of the checkpoint that were trained in their place, or
    the checkpoint's alone. `live`: what it holds beside the adapter, by plain names.

    Raises UserError when the checkpoint holds a tensor that the model has no place for.
    """
    if base:
        same = fits(adapter, base) and live.keys() <= base.keys() | {HEAD}
        naming = None if same else naming_of(source, options, base)
        tensors, altered = _overlaid(
            source, naming.to_memory(base) if naming else base, found, live
        )
    elif live:
        naming = None if config.get("model_type") in SAME_NAMES else naming_of(source, options, ())
        tensors, altered = live, set(live)
    else:
        raise UserError(
            f"{source.path} holds an adapter and no base weights; name them with --base FOLDER"
        )
    tensors, config, notes = without_twin(tensors, config)
    config, more = with_vocabulary(source, tensors, config)
    return Frozen(tensors, config, naming, frozenset(altered), (*notes, *more))


def fits(adapter: Adapter, base: Iterable[str]) -> bool:
    """Whether each module that the adapter names has a weight of that name in `base`."""
    ending = r"\.(lora_|token_adapter\.|base_layer\.|weight$|bias$).*"
    modules = {re.sub(ending, "", name.removeprefix(PREFIX)) for name in adapter.tensors}
    known = set(base) | {HEAD}
    return all(f"{module}.weight" in known for module in modules)


def adapter_alone(source: Source) -> Assembled:
    """`--adapter-only`: a PEFT adapter of its own, by the names of its files."""
    if source.read is not None:
        found = source.read(False)
        live, inside = split(found.tensors)
        if not inside:
            raise UserError(f"--adapter-only: SOURCE {source.path} holds no adapter")
        adapter = adapter_within(source, inside)
        tensors = adapter.tensors | _saved_beside(adapter, found, live)
        action = "gathered"
    elif len(source.adapters) == 1:
        adapter, action = read_adapter(source.adapters[0]), "copied"
        tensors = adapter.tensors
    else:
        raise UserError(f"--adapter-only: SOURCE {source.path} holds no adapter of its own")
    return Assembled(tensors, dict.fromkeys(tensors, action), adapter.config)


def _overlaid(
    source: Source, memory: Tensors, found: Found, live: Tensors
) -> tuple[Tensors, set[str]]:
    """`memory` with trained tensors in place of the base's, and their names."""
    stepped = None if found.trained is None else {plain_name(name) for name in found.trained}
    result, altered, left = dict(memory), set(), []
    for name, tensor in live.items():
        like = memory.get(name)
        if like is None and name != HEAD:
            left += [] if re.fullmatch(QUANTISED, name) else [name]
        elif not tensor.dtype.is_floating_point or (stepped is not None and name not in stepped):
            continue  # quantised, or frozen: the base's own is at least as good
        elif like is None or not (stepped is None and _is_rounded(tensor, like)):
            result[name] = tensor if like is None else tensor.to(like.dtype)
            altered.add(name)
    if left:
        listed = ", ".join(sorted(left)[:LISTED]) + (", …" if len(left) > LISTED else "")
        raise UserError(
            f"{source.path} holds {len(left)} tensor(s) that the base model {source.base} has no "
            f"place for ({listed}); is it another model's?"
        )
    return result, altered


def _is_rounded(live: Tensor, base: Tensor) -> bool:
    """Whether a checkpoint of a narrower dtype has only rounded the base's values."""
    narrower = live.dtype.itemsize < base.dtype.itemsize
    return narrower and live.shape == base.shape and same_values(base.to(live.dtype), live)


def _saved_beside(adapter: Adapter, found: Found, live: Tensors) -> Tensors:
    """Trained tensors that PEFT keeps in the adapter's file: biases, and in a checkpoint of trained
    tensors alone all there is."""
    targeted = {re.sub(r"\.lora_.*", "", name.removeprefix(PREFIX)) for name in adapter.tensors}
    everything = any(f"{module}.weight" in live for module in targeted - {"lm_head"})
    bias = adapter.config.get("bias")
    kept: dict[str, Tensor] = {}
    for name, tensor in live.items():
        module, _, what = name.rpartition(".")
        own = f"{PREFIX}{module}.base_layer.{what}" if module in targeted else PREFIX + name
        biased = what == "bias" and (bias == "all" or (bias == "lora_only" and module in targeted))
        if (biased or is_saved(adapter.config, module) or not everything) and (
            own not in adapter.tensors
        ):
            kept[own] = tensor.called(own)
    return kept
