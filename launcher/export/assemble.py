"""From what a source holds to every tensor of the result: read, dequantise, name, merge, cast."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export import quantised
from launcher.export.gathered import Assembled, Options, Tensors, gathered, naming_of
from launcher.export.merge import Merged, merge
from launcher.export.merge.adapter import Adapter, read_adapter, split
from launcher.export.readers import folder
from launcher.export.readers.found import Found
from launcher.export.readers.strided import Strided
from launcher.export.source import Source, read_json
from launcher.export.tensor import Held
from launcher.export.tensor.stored import Stored


def assemble(source: Source, options: Options) -> Assembled:
    """Every output tensor, none of them read yet. Raises UserError for what does not fit."""
    if options.adapter_only:
        return _adapter_alone(source, options)
    config = _config(source)
    base = _base(source.base, config) if source.base else {}
    notes: list[str] = []
    if source.base and config.get("quantization_config"):
        base, config = quantised.dequantised(base, config)
        notes.append("the quantised base was dequantised")
    found = source.read(options.dtype == torch.float32) if source.read else None
    if found is None and not source.adapters:
        result = Assembled(base, dict.fromkeys(base, "copied"), config)
    elif found is None:
        result = _merged(source, base, base, config, _adapters(source), options)
    else:
        result = _from_sharded(source, base, found, config, options)
        notes += found.notes
    result = replace(result, actions=_told(result), notes=(*notes, *result.notes))
    return _in_dtype(result, options.dtype)


def _from_sharded(
    source: Source, base: Tensors, found: Found, config: dict[str, Any], options: Options
) -> Assembled:
    live, inside = split(found.tensors)
    if inside:
        frozen = base or live
        if not frozen:
            raise UserError(
                f"{source.path} holds an adapter and no base weights; name them with --base FOLDER"
            )
        return _merged(source, base, frozen, config, [_adapter_within(source, inside)], options)
    return gathered(source, base, replace(found, tensors=live), config, options)


def _base(path: Path, config: dict[str, Any]) -> Tensors:
    """The base folder's tensors. A pickled one stores a tied head again: it is left out."""
    found = folder.read_model(path)
    if config.get("tie_word_embeddings"):
        return found.tensors
    twins = {twin: found.tensors[kept].called(twin) for twin, kept in found.aliases.items()}
    return found.tensors | twins


def _merged(
    source: Source,
    disk: Tensors,
    frozen: Tensors,
    config: dict[str, Any],
    adapters: list[Adapter],
    options: Options,
) -> Assembled:
    """`disk`: the base folder's tensors, none when the checkpoint holds them; `frozen`: those that
    the adapters go onto."""
    scheme = _scheme(source)
    same = all(_fits(each, frozen) for each in adapters)
    naming = None if same else naming_of(source, options, disk)
    memory = naming.to_memory(frozen) if naming and frozen is disk else frozen
    notes: tuple[str, ...] = ()
    if options.qlora_base == "dequantized":
        if scheme is None:
            raise UserError(
                "--qlora-base dequantized: no quantization is known of this training; it goes "
                "with a QLoRA run or a quantised base"
            )
        memory = quantised.round_trip(memory, config, scheme)
        notes = ("merged onto the dequantised base that training saw",)
    elif scheme is not None:
        notes = ("a QLoRA adapter, merged onto the original 16-bit base",)
    result: Merged = merge(memory, config, adapters, options.tied, options.device)
    tensors = naming.to_disk(result.tensors) if naming else result.tensors
    if not naming:
        actions = result.actions
    else:
        touched = {name for name, action in result.actions.items() if action != "copied"}
        actions = {
            name: "copied" if disk.get(name) == tensor or not touched else "merged"
            for name, tensor in tensors.items()
        }
    return Assembled(tensors, actions, config | result.config, (*notes, *result.notes))


def _told(result: Assembled) -> dict[str, str]:
    """What is no copy of bytes in a file, and yet not merged, was dequantised."""
    plain = (Stored, Strided, Held)
    return {
        name: "dequantised"
        if action == "copied" and not isinstance(result.tensors[name], plain)
        else action
        for name, action in result.actions.items()
    }


def _adapters(source: Source) -> list[Adapter]:
    return [read_adapter(folder) for folder in source.adapters]


def _adapter_within(source: Source, inside: dict[str, Tensors]) -> Adapter:
    """The adapter of a sharded checkpoint of a PEFT model."""
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


def _adapter_alone(source: Source, options: Options) -> Assembled:
    """`--adapter-only`: a PEFT adapter of its own, by the names of its files."""
    if source.read is not None:
        adapter = _adapter_within(source, split(source.read(False).tensors)[1] or {"": {}})
    elif len(source.adapters) == 1:
        adapter = read_adapter(source.adapters[0])
    else:
        raise UserError(f"--adapter-only: SOURCE {source.path} holds no adapter of its own")
    if not adapter.tensors:
        raise UserError(f"--adapter-only: SOURCE {source.path} holds no adapter")
    actions = dict.fromkeys(adapter.tensors, "gathered" if source.read else "copied")
    tensors = {
        name: tensor.to(options.dtype or tensor.dtype) for name, tensor in adapter.tensors.items()
    }
    return Assembled(tensors, actions, adapter.config)


def _config(source: Source) -> dict[str, Any]:
    where = [source.base] if source.base else list(source.companions)
    return read_json(where[0] / "config.json")


def _scheme(source: Source) -> dict[str, Any] | None:
    """How the base was quantised while the adapter was trained, where a config beside it says."""
    for beside in source.companions:
        if beside != source.base and (beside / "config.json").is_file():
            scheme = read_json(beside / "config.json").get("quantization_config")
            if scheme is not None:
                return dict(scheme)
    return None


def _fits(adapter: Adapter, base: Iterable[str]) -> bool:
    """Whether each module that the adapter names has a weight of that name in `base`."""
    ending = r"\.(lora_|token_adapter\.|base_layer\.|weight$|bias$).*"
    modules = {
        re.sub(ending, "", name.removeprefix("base_model.model.")) for name in adapter.tensors
    }
    known = set(base) | {"lm_head.weight"}
    return all(f"{module}.weight" in known for module in modules)


def _in_dtype(result: Assembled, dtype: torch.dtype | None) -> Assembled:
    if dtype is None:
        return result
    tensors = {name: tensor.to(dtype) for name, tensor in result.tensors.items()}
    actions = {
        name: "cast" if action == "copied" and tensors[name] is not result.tensors[name] else action
        for name, action in result.actions.items()
    }
    return replace(result, tensors=tensors, actions=actions, config=_saying(result.config, dtype))


def _saying(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`config` with every statement of the weights' dtype set right."""
    said = str(dtype).removeprefix("torch.")
    result = {
        key: _saying(value, dtype) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    stated = [key for key in ("dtype", "torch_dtype") if key in config]
    return result | dict.fromkeys(stated, said)
