"""Adapters in sharded checkpoints, and the base weights that were trained with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import UserError
from launcher.export import names
from launcher.export.assembled import (
    SAME_NAMES,
    Assembled,
    Config,
    Options,
    Tensors,
    naming_of,
    with_vocabulary,
    without_twins,
)
from launcher.export.completeness import known_tensors
from launcher.export.merge import Adapter, read_adapter, split_adapters
from launcher.export.merge.edits import same_values
from launcher.export.merge.ties import HEAD
from launcher.export.names import Naming
from launcher.export.source import Source
from launcher.export.unwrapped import unwrapped_adapter
from launcher.folders.adapter import SETTINGS, read_settings
from launcher.folders.brief import listed
from launcher.folders.model_config import read_model_config
from launcher.folders.vocabulary import config_value
from launcher.io.adapter import ADAPTER_NAME, PARAMETER_SUFFIX, PREFIX, plain_name
from launcher.io.adapter_config import check_only_lora, inferred_settings, is_saved
from launcher.io.adapter_places import in_composite
from launcher.io.places import Places
from launcher.io.readers.found import FoundModel
from launcher.io.readers.wrapper_prefixes import QUANTIZATION_STATE
from launcher.io.readers.zero import NO_FROZEN
from launcher.io.stated_dtype import stated_dtype
from launcher.io.tensor import Tensor

LISTED = 5  # names in a message


@dataclass(frozen=True)
class FrozenBase:
    """The weights that adapters are merged into."""

    tensors: Tensors  # by their names in memory
    config: Config
    naming: Naming | None  # None: the names on disk are the same
    trained: frozenset[str] = frozenset()  # names whose values are the checkpoint's
    notes: tuple[str, ...] = ()
    places: Places | None = None  # of the model that was trained alone, if it was


def sharded_adapter(source: Source, adapter_tensors: dict[str, Tensors], has_base: bool) -> Adapter:
    """The adapter of a sharded checkpoint of a PEFT model. `adapter_tensors`: by adapter name.
    `has_base`: the checkpoint contains its base, without the first factors that PiSSA and others
    took out of it.

    Raises UserError if one of several adapters has to be chosen, or if its configuration is
    missing.
    """
    found = ", ".join(sorted(adapter_tensors))
    if source.adapter_name is None and len(adapter_tensors) > 1:
        raise UserError(
            f"{source.path} contains {len(adapter_tensors)} adapters ({found}) → choose one of "
            "them with --adapter-name"
        )
    name = source.adapter_name or found
    if name not in adapter_tensors:
        raise UserError(
            f"--adapter-name {name}: {source.path} contains no such adapter, but {found} "
            "→ one of them"
        )
    tensors = adapter_tensors[name]
    settings = _settings_of(source, name, is_alone=len(adapter_tensors) == 1)
    if settings is not None:
        config = read_settings(settings) | ({"init_lora_weights": True} if has_base else {})
        return Adapter(source.path, config, tensors)
    if source.alpha is None:
        file = "adapter_config.json" if len(adapter_tensors) == 1 else f"{name}/{SETTINGS}"
        raise UserError(
            f"{source.path} contains LoRA tensors, but there is no {file} beside it: "
            "alpha is unknown → copy the file from the training to that folder, or name the alpha "
            "with --alpha"
        )
    return Adapter(source.path, inferred_settings(source.path, tensors, source.alpha), tensors)


def _settings_of(source: Source, name: str, is_alone: bool) -> Path | None:
    """The adapter_config.json of the adapter `name`. PEFT writes that of an adapter which is not
    "default" in a folder of its name. `is_alone`: the state contains no other adapter."""
    top = source.adapter_config
    own = (top.parent if top is not None else source.path) / name / SETTINGS
    if name != ADAPTER_NAME and own.is_file():
        return own
    return top if is_alone or name == ADAPTER_NAME else None


def frozen_base(
    source: Source,
    base: Tensors,
    found: FoundModel,
    adapter: Adapter,
    config: Config,
    options: Options,
    places: Places | None,
) -> FrozenBase:
    """The base folder's tensors, with the trained ones replaced by those of the checkpoint. Without
    a base folder: the checkpoint's tensors alone.

    `found`: what the checkpoint contains besides the adapter, by plain names. Raises UserError if
    it contains a tensor that the model does not have.
    """
    model_tensors = found.tensors
    notes: tuple[str, ...] = ()
    if base:
        same_names = fits(adapter, base, config) and model_tensors.keys() <= _names(base, config)
        naming = None if same_names else naming_of(source, options, base)
        memory = naming.to_memory(base) if naming else base
        tensors, trained = _with_trained(source, memory, found, model_tensors)
    elif model_tensors:
        naming = None if config.get("model_type") in SAME_NAMES else naming_of(source, options, ())
        model_tensors, notes = known_tensors(source.path, config, model_tensors)
        stated = stated_dtype(config)
        tensors = {
            name: tensor.to(stated or tensor.dtype) for name, tensor in model_tensors.items()
        }
        trained = set(model_tensors)
    else:
        raise UserError(
            f"{source.path} contains an adapter and no base weights; name them with --base FOLDER"
        )
    tensors, config, tie_notes = without_twins(source, base, tensors, config)
    config, vocabulary_notes = with_vocabulary(source, base, tensors, config)
    notes = (*notes, *tie_notes, *vocabulary_notes)
    return FrozenBase(tensors, config, naming, frozenset(trained), notes, places=places)


def fits(adapter: Adapter, base: Iterable[str], config: Config) -> bool:
    """Whether `base`, which `config` describes, has a weight for each module that the adapter
    names."""
    modules = {re.sub(PARAMETER_SUFFIX, "", n.removeprefix(PREFIX)) for n in adapter.tensors}
    known = _names(base, config)
    return all(f"{module}.weight" in known for module in modules)


def _names(base: Iterable[str], config: Config) -> set[str]:
    """The names in `base`, and that of a tied head, which it need not contain. A head that is not
    tied may have another name on disk (`embed_out` of GPT-NeoX)."""
    is_untied = config_value(config, "tie_word_embeddings") is False
    return set(base) | (set() if is_untied else {HEAD})


def adapter_only_result(source: Source) -> Assembled:
    """The result of `--adapter-only`: a PEFT adapter, by the names in PEFT's files for the class
    that the base's config.json names, which servers load.

    Raises UserError if the source contains no adapter, or several.
    """
    notes: tuple[str, ...] = ()
    none = f"--adapter-only: SOURCE {source.path} contains no adapter → leave the option out"
    if source.read is not None:
        found = source.read(False)
        check_only_lora(source.path, found.tensors)
        model_tensors, adapter_tensors = split_adapters(found.tensors)
        if not adapter_tensors:
            raise UserError(none)
        adapter = sharded_adapter(source, adapter_tensors, has_base=False)  # for the plain base
        tensors = adapter.tensors | _saved_with_adapter(adapter, model_tensors)
        action, notes = "gathered", tuple(note for note in found.notes if note != NO_FROZEN)
    elif len(source.adapters) == 1:
        adapter, action = read_adapter(source.adapters[0]), "copied"
        tensors = adapter.tensors
    elif source.adapters:
        raise UserError(
            f"--adapter-only writes one adapter, and --adapter names {len(source.adapters)} → one "
            f"of them as SOURCE: shardway consolidate {source.adapters[0]} --adapter-only"
        )
    else:
        raise UserError(none)
    adapter = replace(adapter, tensors=tensors)
    if source.base_config is not None:
        config = read_model_config(source.base_config)
        places = names.places_in(config, source.trained_class)
        adapter = unwrapped_adapter(source.path, config, {}, adapter, places)
        adapter = in_composite(adapter, places)
    actions = dict.fromkeys(adapter.tensors, action)
    return Assembled(adapter.tensors, actions, adapter.config, notes)


def _with_trained(
    source: Source, memory: Tensors, found: FoundModel, model_tensors: Tensors
) -> tuple[Tensors, set[str]]:
    """(`memory` with trained tensors in place of the base's, the names of the trained tensors)."""
    updated = None if found.trained is None else {plain_name(name) for name in found.trained}
    result, trained, unmatched = dict(memory), set(), []
    for name, tensor in model_tensors.items():
        like = memory.get(name)
        if like is None and name != HEAD:
            unmatched += [] if re.fullmatch(QUANTIZATION_STATE, name) else [name]
        elif not tensor.dtype.is_floating_point or (updated is not None and name not in updated):
            continue  # quantized or frozen: the base's tensor is at least as precise
        elif like is None or not (updated is None and _is_rounded(tensor, like)):
            result[name] = tensor if like is None else tensor.to(like.dtype)
            trained.add(name)
    if unmatched:
        raise UserError(
            f"{source.path} contains {len(unmatched)} tensor(s) that the base model {source.base} "
            f"does not have ({listed(sorted(unmatched), LISTED)}) → --base with the model that it "
            "was trained from"
        )
    return result, trained


def _is_rounded(tensor: Tensor, base: Tensor) -> bool:
    """Whether `tensor` is the base's tensor rounded to a narrower dtype."""
    is_narrower = tensor.dtype.itemsize < base.dtype.itemsize
    return is_narrower and tensor.shape == base.shape and same_values(base.to(tensor.dtype), tensor)


def _saved_with_adapter(adapter: Adapter, model_tensors: Tensors) -> Tensors:
    """The trained tensors that PEFT saves in the adapter's file: biases and modules_to_save. If the
    checkpoint contains only trained tensors: all of them."""
    targeted = {re.sub(r"\.lora_.*", "", name.removeprefix(PREFIX)) for name in adapter.tensors}
    has_frozen = any(f"{module}.weight" in model_tensors for module in targeted - {"lm_head"})
    bias = adapter.config.get("bias")
    saved: dict[str, Tensor] = {}
    for name, tensor in model_tensors.items():
        module, _, leaf = name.rpartition(".")
        key = f"{PREFIX}{module}.base_layer.{leaf}" if module in targeted else PREFIX + name
        is_trained_bias = leaf == "bias" and (
            bias == "all" or (bias == "lora_only" and module in targeted)
        )
        is_wanted = is_trained_bias or is_saved(adapter.config, module) or not has_frozen
        if is_wanted and key not in adapter.tensors:
            saved[key] = tensor.renamed(key)
    return saved
