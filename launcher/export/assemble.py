"""Turns a source into the tensors of the result: read, dequantize, name, merge, cast.

No tensor is read here: each step wraps the tensors of the previous one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export import names, quantized
from launcher.export.assembled import (
    Assembled,
    Config,
    Options,
    Tensors,
    in_dtype,
    naming_of,
    tied_layers,
)
from launcher.export.base_format import in_base_format
from launcher.export.completeness import class_naming, without_value_head
from launcher.export.full_model import full_model
from launcher.export.merge import Adapter, Merged, merge, read_adapter, split_adapters
from launcher.export.merge.edits import same_values
from launcher.export.merge.initial_factors import without_initial
from launcher.export.merge.tied_adapters import with_stored_names
from launcher.export.merge.ties import find_embedding_pair
from launcher.export.sharded_adapter import (
    FrozenBase,
    adapter_only_result,
    fits,
    frozen_base,
    sharded_adapter,
)
from launcher.export.source import Source
from launcher.export.source_folders import model_home
from launcher.export.text_only import text_model
from launcher.export.unwrapped import unwrapped_adapter, unwrapped_folder, unwrapped_state
from launcher.folders.model_config import read_model_config
from launcher.folders.quantization import quantization_of, read_quantization
from launcher.folders.tensor_entries import tensor_names
from launcher.folders.vocabulary import config_value
from launcher.io import adapter_places
from launcher.io.adapter import contains_base
from launcher.io.adapter_config import check_only_lora
from launcher.io.places import Places
from launcher.io.readers import model_folder
from launcher.io.readers.found import FoundModel
from launcher.io.readers.strided import Strided
from launcher.io.readers.zero import NO_FROZEN
from launcher.io.tensor import InMemory
from launcher.io.tensor.stored import Stored


def assemble(source: Source, options: Options) -> Assembled:
    """Every output tensor. Raises UserError if the parts of the source or the options do not fit
    each other."""
    if options.adapter_only:
        return in_dtype(adapter_only_result(source), options.dtype)
    config = _read_config(source)
    notes: list[str] = []
    base: Tensors = {}
    if source.base:
        base, base_notes = _read_base(source, config)
        notes += base_notes
    stored = base
    found = source.read(options.dtype == torch.float32) if source.read else None
    is_merged = bool(source.adapters or source.earlier_adapters or found is not None)
    if is_merged or not options.base_format:
        base, config, found, changes = _dequantized(source, base, config, found)
        notes += changes
    plain = base
    done_before: dict[str, str] = {}
    for earlier in source.earlier_adapters:
        merged = _assemble_adapters(replace(source, adapters=(earlier,)), base, config, Options())
        base, config = merged.tensors, merged.config
        done_before |= {n: action for n, action in merged.actions.items() if action != "copied"}
        notes += merged.notes
    if found is not None:
        result = _assemble_sharded(source, base, found, config, options)
        notes += [note for note in found.notes if note != NO_FROZEN or not base]
    elif source.adapters:
        result = _assemble_adapters(source, base, config, options)
    elif options.qlora_base == "dequantized":
        raise UserError("--qlora-base dequantized needs an adapter, and SOURCE has none")
    elif options.tied != "auto":
        raise UserError(f"--tied {options.tied} needs an adapter, and SOURCE has none")
    else:
        result = _as_on_disk(source, base, config)
    actions = {n: done_before.get(n, a) if a == "copied" else a for n, a in result.actions.items()}
    result = replace(result, actions=actions)
    actions = label_dequantized(result)
    result = replace(result, actions=actions, notes=(*notes, *result.notes))
    result = _with_explicit_tie(result)
    if options.base_format:
        return in_base_format(result, plain, stored, _read_config(source))
    if options.text_only:
        result = text_model(source, result, options)
    return in_dtype(result, options.dtype)


def _dequantized(
    source: Source, base: Tensors, config: Config, found: FoundModel | None
) -> tuple[Tensors, Config, FoundModel | None, list[str]]:
    """(base, config, found, notes): all in floating point. A checkpoint without a base may contain
    quantized weights itself, or plain ones beside the config.json of a quantized model."""
    scheme = read_quantization(model_home(source), config)
    tensors, plain = quantized.dequantize_tensors(base, config, scheme)
    is_changed, base = tensors != base, tensors
    if found is not None and (not base or quantized.has_unscaled(found.tensors)):
        tensors, _ = quantized.dequantize_tensors(found.tensors, config, scheme)
        is_changed = is_changed or tensors != found.tensors
        found = replace(found, tensors=tensors)
    notes = []
    if is_changed:
        notes.append("the quantized weights were dequantized")
    elif scheme is not None:
        notes.append(
            "quantization_config was left out of config.json: the weights are not quantized"
        )
    return base, plain, found, notes


def _as_on_disk(source: Source, base: Tensors, config: Config) -> Assembled:
    """The tensors of a model folder, copied. Torch files that a trainer saved (zero_to_fp32, FSDP's
    FULL_STATE_DICT) may have the names in memory: these become the names on disk."""
    result = Assembled(base, dict.fromkeys(base, "copied"), config)
    naming = None if tensor_names(source.path) else class_naming(source.path, config)
    if naming is None or not naming.shapes.keys() >= base.keys():
        return result
    tensors = names.naming_of_config(source.path, config).to_disk(base)
    if tensors.keys() == base.keys():
        return result
    actions = {n: "copied" if base.get(n) == tensor else "renamed" for n, tensor in tensors.items()}
    note = "the names in memory, as a trainer saved them, became the names on disk"
    return Assembled(tensors, actions, config, (note,))


def label_dequantized(result: Assembled) -> dict[str, str]:
    """The actions, with "dequantized" in place of "copied" for tensors that are not a copy of bytes
    in a file."""
    copies = (Stored, Strided, InMemory)
    return {
        name: "dequantized"
        if action == "copied" and not isinstance(result.tensors[name], copies)
        else action
        for name, action in result.actions.items()
    }


def _assemble_sharded(
    source: Source, base: Tensors, found: FoundModel, config: Config, options: Options
) -> Assembled:
    """From a sharded checkpoint of a full model, or of a model with an adapter."""
    model_tensors, adapter_tensors = split_adapters(found.tensors)
    check_only_lora(source.path, found.tensors)
    has_base = contains_base(found.tensors)
    places = names.places_in(config, source.trained_class)
    where = source.path, config, base
    found = unwrapped_state(*where, replace(found, tensors=model_tensors), places)
    found = names.in_composite(found, places)
    if not adapter_tensors:
        if source.alpha is not None or source.adapter_name is not None:
            raise UserError(f"{source.path} contains no adapter → leave out its options")
        return full_model(source, base, found, config, options)
    adapter = _unwrapped(where, sharded_adapter(source, adapter_tensors, has_base), places)
    frozen = frozen_base(source, base, found, adapter, config, options, places)
    return _merge_adapters(source, base, frozen, [adapter], options)


def _assemble_adapters(
    source: Source, base: Tensors, config: Config, options: Options
) -> Assembled:
    """From adapter folders and their base."""
    places = names.places_in(config, source.trained_class)
    where = source.path, config, base
    adapters = [_unwrapped(where, read_adapter(folder), places) for folder in source.adapters]
    same_names = all(fits(adapter, base, config) for adapter in adapters)
    naming = None if same_names else naming_of(source, options, base)
    memory = naming.to_memory(base) if naming else base
    frozen = FrozenBase(memory, config, naming, places=places)
    return _merge_adapters(source, base, frozen, adapters, options)


def _unwrapped(
    where: tuple[Path, Config, Tensors], adapter: Adapter, places: Places | None
) -> Adapter:
    """`adapter` by the names of the base's class. `where`: the source, its config, its base."""
    adapter = without_initial(adapter)
    adapter = unwrapped_adapter(*where, adapter, places)
    return adapter_places.in_composite(adapter, places)


def _merge_adapters(
    source: Source, disk: Tensors, frozen: FrozenBase, adapters: list[Adapter], options: Options
) -> Assembled:
    """`frozen` with the adapters merged. `disk`: the tensors of the base folder, {} if the weights
    are in the checkpoint."""
    weights, note = _merge_target(source, frozen, options)
    if frozen.naming is not None:
        tied = tied_layers(frozen.naming)
        adapters = [with_stored_names(adapter, weights.keys(), tied) for adapter in adapters]
    merged: Merged = merge(weights, frozen.config, adapters, options.tied, options.device)
    tensors, notes = merged.tensors, (*frozen.notes, *note, *merged.notes)
    if weights is not frozen.tensors:  # computed in training's dtype, written in the base's
        original = frozen.tensors  # lacks a head that was untied
        tensors = {
            name: tensor.to(original[name].dtype) if name in original else tensor
            for name, tensor in tensors.items()
        }
    config = frozen.config | merged.config
    if frozen.naming is None:
        actions = {
            name: "gathered" if action == "copied" and name in frozen.trained else action
            for name, action in merged.actions.items()
        }
        return Assembled(tensors, actions, config, notes)
    tensors = frozen.naming.to_disk(tensors)
    actions = {
        name: "copied" if disk.get(name) == tensor else "merged" for name, tensor in tensors.items()
    }
    return Assembled(tensors, actions, config, notes)


def _merge_target(
    source: Source, frozen: FrozenBase, options: Options
) -> tuple[Tensors, tuple[str, ...]]:
    """(the weights that adapters are merged into, notes): those of `frozen`, or the ones that QLoRA
    training used."""
    scheme = _quantization_scheme(source)
    if options.qlora_base == "dequantized":
        if scheme is None:
            raise UserError(
                "--qlora-base dequantized: no quantization is known for this training; use it with "
                "a QLoRA run or a quantized base"
            )
        if scheme.get("merged_first"):
            raise UserError(
                "--qlora-base dequantized: other adapters were merged before the base was "
                "quantized, and only their sum is known; use --qlora-base original"
            )
        weights = quantized.quantize_round_trip(frozen.tensors, frozen.config, scheme)
        if frozen.places is not None:  # the other parts were not there
            weights |= {n: t for n, t in frozen.tensors.items() if not frozen.places.contains(n)}
        return weights, ("merged into the dequantized base that training used",)
    if scheme is not None:
        return frozen.tensors, ("a QLoRA adapter, merged into the original 16-bit base",)
    return frozen.tensors, ()


def _quantization_scheme(source: Source) -> Config | None:
    """How training quantized the base, if SOURCE or a config beside it contains this."""
    if source.scheme is not None:
        return source.scheme
    for folder in source.extra_file_folders:
        if folder != source.base and (folder / "config.json").is_file():
            scheme = quantization_of(read_model_config(folder / "config.json"))
            if scheme is not None:
                return scheme
    return None


def _read_config(source: Source) -> Config:
    return read_model_config(model_home(source) / "config.json")


def _read_base(source: Source, config: Config) -> tuple[Tensors, tuple[str, ...]]:
    """(the tensors of the base folder, notes). A torch file also stores a tied head, which is left
    out."""
    path = model_home(source)
    is_source = path == source.path  # a model folder whose weights are taken as they are
    found = model_folder.read_model(path, source.model_key if is_source else None)
    tensors = found.tensors
    if not config_value(config, "tie_word_embeddings"):
        tensors = tensors | {a: tensors[name].renamed(a) for a, name in found.aliases.items()}
    tensors, head = without_value_head(path, config, unwrapped_folder(path, config, tensors))
    return tensors, (*found.notes, *head)


def _with_explicit_tie(result: Assembled) -> Assembled:
    """Set tie_word_embeddings to false if embedding and head differ and the config does not specify
    it: otherwise each server would choose its own default."""
    pair = find_embedding_pair(result.tensors, result.config)
    if pair is None or config_value(result.config, "tie_word_embeddings") is not None:
        return result
    actions = {result.actions.get(pair.embedding), result.actions.get(pair.head)}
    if pair.head not in result.tensors or actions == {"copied"}:
        return result
    if same_values(result.tensors[pair.head], result.tensors[pair.embedding]):
        return result
    return replace(result, config=result.config | {"tie_word_embeddings": False})
