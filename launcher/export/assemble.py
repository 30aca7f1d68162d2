"""From what a source holds to every tensor of the result: read, dequantise, name, merge, cast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export import quantised
from launcher.export.gathered import Assembled, Options, Tensors, gathered, naming_of
from launcher.export.merge import Adapter, Merged, merge, read_adapter, split
from launcher.export.merge.edits import same_values
from launcher.export.merge.ties import find_ends, setting
from launcher.export.readers import folder
from launcher.export.readers.found import Found
from launcher.export.readers.strided import Strided
from launcher.export.readers.zero import NO_FROZEN
from launcher.export.source import Source, read_json
from launcher.export.tensor import Held
from launcher.export.tensor.stored import Stored
from launcher.export.within import Frozen, adapter_alone, adapter_within, fits, frozen_within


def assemble(source: Source, options: Options) -> Assembled:
    """Every output tensor, none of them read yet. Raises UserError for what does not fit."""
    if options.adapter_only:
        return _in_dtype(adapter_alone(source), options.dtype)
    config = _config(source)
    base = _base(source.base, config) if source.base else {}
    notes: list[str] = []
    found = source.read(options.dtype == torch.float32) if source.read else None
    computes = bool(source.adapters) or found is not None or options.dtype is not None
    if source.base and config.get("quantization_config") and computes:
        base, config = quantised.dequantised(base, config)
        notes.append("the quantised base was dequantised")
    if found is not None:
        result = _from_sharded(source, base, found, config, options)
        notes += [note for note in found.notes if note != NO_FROZEN or not base]
    elif source.adapters:
        adapters = [read_adapter(folder) for folder in source.adapters]
        naming = (
            None if all(fits(each, base) for each in adapters) else naming_of(source, options, base)
        )
        memory = naming.to_memory(base) if naming else base
        result = _merged(source, base, Frozen(memory, config, naming), adapters, options)
    elif options.qlora_base == "dequantized":
        raise UserError("--qlora-base dequantized goes with an adapter, and there is none")
    elif options.tied != "auto":
        raise UserError(f"--tied {options.tied} goes with an adapter, and there is none")
    else:
        result = Assembled(base, dict.fromkeys(base, "copied"), config)
    result = replace(result, actions=_told(result), notes=(*notes, *result.notes))
    return _in_dtype(_with_ties_said(result), options.dtype)


def _from_sharded(
    source: Source, base: Tensors, found: Found, config: dict[str, Any], options: Options
) -> Assembled:
    live, inside = split(found.tensors)
    if not inside:
        return gathered(source, base, replace(found, tensors=live), config, options)
    adapter = adapter_within(source, inside)
    frozen = frozen_within(source, base, found, live, adapter, config, options)
    return _merged(source, base, frozen, [adapter], options)


def _base(path: Path, config: dict[str, Any]) -> Tensors:
    """The base folder's tensors. A pickled one stores a tied head again: it is left out."""
    found = folder.read_model(path)
    if setting(config, "tie_word_embeddings"):
        return found.tensors
    twins = {twin: found.tensors[kept].called(twin) for twin, kept in found.aliases.items()}
    return found.tensors | twins


def _merged(
    source: Source, disk: Tensors, frozen: Frozen, adapters: list[Adapter], options: Options
) -> Assembled:
    """`disk`: the base folder's tensors, none when the checkpoint holds them."""
    scheme, memory, notes = _scheme(source), frozen.tensors, list(frozen.notes)
    if options.qlora_base == "dequantized":
        if scheme is None:
            raise UserError(
                "--qlora-base dequantized: no quantization is known of this training; it goes "
                "with a QLoRA run or a quantised base"
            )
        if scheme.get("merged_first"):
            raise UserError(
                "--qlora-base dequantized: other adapters were merged before the base was "
                "quantised, and only their sum is known; leave it at original"
            )
        memory = quantised.round_trip(memory, frozen.config, scheme)
        notes.append("merged onto the dequantised base that training saw")
    elif scheme is not None:
        notes.append("a QLoRA adapter, merged onto the original 16-bit base")
    result: Merged = merge(memory, frozen.config, adapters, options.tied, options.device)
    if memory is not frozen.tensors:  # computed in training's dtype, written in the base's
        of = frozen.tensors  # a head that was untied is new
        back = {n: t.to(of[n].dtype) if n in of else t for n, t in result.tensors.items()}
        result = replace(result, tensors=back)
    config = frozen.config | result.config
    if frozen.naming is None:
        actions = {
            name: "gathered" if action == "copied" and name in frozen.altered else action
            for name, action in result.actions.items()
        }
        return Assembled(result.tensors, actions, config, (*notes, *result.notes))
    tensors = frozen.naming.to_disk(result.tensors)
    actions = {
        name: "copied" if disk.get(name) == tensor else "merged" for name, tensor in tensors.items()
    }
    return Assembled(tensors, actions, config, (*notes, *result.notes))


def _told(result: Assembled) -> dict[str, str]:
    """What is no copy of bytes in a file, and yet not merged, was dequantised."""
    plain = (Stored, Strided, Held)
    return {
        name: "dequantised"
        if action == "copied" and not isinstance(result.tensors[name], plain)
        else action
        for name, action in result.actions.items()
    }


def _with_ties_said(result: Assembled) -> Assembled:
    """A config that does not say whether embedding and head are one leaves it to each server: once
    they differ it must say no."""
    ends = find_ends(result.tensors, result.config)
    if ends is None or setting(result.config, "tie_word_embeddings") is not None:
        return result
    changed_ends = {result.actions.get(ends.embedding), result.actions.get(ends.head)}
    if ends.head not in result.tensors or changed_ends == {"copied"}:
        return result
    if same_values(result.tensors[ends.head], result.tensors[ends.embedding]):
        return result
    return replace(result, config=result.config | {"tie_word_embeddings": False})


def _config(source: Source) -> dict[str, Any]:
    where = [source.base] if source.base else list(source.companions)
    return read_json(next(f / "config.json" for f in where if (f / "config.json").is_file()))


def _scheme(source: Source) -> dict[str, Any] | None:
    """How the base was quantised while the adapter was trained, where SOURCE or a config beside it
    says so."""
    if source.scheme is not None:
        return source.scheme
    for beside in source.companions:
        if beside != source.base and (beside / "config.json").is_file():
            scheme = read_json(beside / "config.json").get("quantization_config")
            if scheme is not None:
                return dict(scheme)
    return None


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
