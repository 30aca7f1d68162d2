"""Turns the gathered shards of a full model into the tensors of a model folder: names, dtypes,
ties, vocabulary."""

from __future__ import annotations

import torch

from launcher.errors import UserError
from launcher.export.assembled import (
    SAME_NAMES,
    Assembled,
    Config,
    Options,
    Tensors,
    naming_of,
    stated_dtype,
    with_vocabulary,
    without_twins,
)
from launcher.export.completeness import known_tensors
from launcher.export.merge.ties import HEAD
from launcher.export.source import Source, model_home
from launcher.folders.kind import Kind
from launcher.folders.vocabulary import config_value
from launcher.io.readers.found import FoundModel
from launcher.io.tensor import Tensor


def full_model(
    source: Source, base: Tensors, found: FoundModel, config: Config, options: Options
) -> Assembled:
    """The trained tensors by their names on disk, in the dtypes of the base or of the config, with
    the base's tensors that the model's class does not build.

    `base` is empty if no base folder is known. Raises UserError if the tensors do not belong to the
    model that base and config describe.
    """
    gathered = found.tensors
    notes: tuple[str, ...] = ()
    if not base:
        gathered, notes = known_tensors(source.path, config, gathered)
    if source.partial or found.partial:
        gathered = _base_in_memory(source, base, gathered, options) | gathered
    tensors, config, tie_notes = without_twins(source, base, gathered, config)
    config, vocabulary_notes = with_vocabulary(source, base, tensors, config)
    # DCP_SAFETENSORS does not show whether a rank's files are missing: shapes must be compared.
    known = config.get("model_type") in SAME_NAMES and source.kind != Kind.DCP_SAFETENSORS
    if tensors.keys() != base.keys() and not (known and base.keys() <= tensors.keys() | {HEAD}):
        naming = naming_of(source, options, base)
        tensors = naming.to_disk(naming.unbuilt(base) | tensors)
    tensors |= {
        alias: tensors[name].renamed(alias)
        for alias, name in found.aliases.items()
        if name in tensors and (alias in base or not config_value(config, "tie_word_embeddings"))
    }
    if base:
        tensors = _in_base_dtypes(source, base, tensors, config)
    else:
        stated = stated_dtype(config)
        tensors = {name: tensor.to(stated or tensor.dtype) for name, tensor in tensors.items()}
    actions = {
        name: "copied" if name in base and tensor is base[name] else "gathered"
        for name, tensor in tensors.items()
    }
    return Assembled(tensors, actions, config, (*notes, *tie_notes, *vocabulary_notes))


def _base_in_memory(source: Source, base: Tensors, trained: Tensors, options: Options) -> Tensors:
    """The base by the names in memory, which are the names in `trained`. Raises UserError if there
    is no base."""
    if not base:
        raise UserError(
            f"{source.path} contains a part of the model that {model_home(source) / 'config.json'} "
            "describes, and the other parts are in its base; name that with --base FOLDER"
        )
    if trained.keys() <= base.keys():
        return base
    return naming_of(source, options, base).to_memory(base)


def _in_base_dtypes(source: Source, base: Tensors, tensors: Tensors, config: Config) -> Tensors:
    """The trained tensors in the base's dtypes. Raises UserError if names or shapes differ."""
    # Some folders also store a tied head, but a tied model trains only one tensor. If a tied base
    # was untied, the head is the trained one.
    heads = {HEAD}
    differing = tensors.keys() ^ base.keys()
    if config_value(config, "tie_word_embeddings"):
        differing -= heads - tensors.keys()
    else:
        differing -= heads - base.keys()
    if differing:
        raise UserError(
            f"{source.path} and the base model {source.base} differ in {len(differing)} tensor(s), "
            f"such as {min(differing)}; do they belong to different models?"
        )
    result = {}
    for name, tensor in tensors.items():
        like = base.get(name, tensor)
        rows_may_differ = tensor.shape == (config.get("vocab_size"), *like.shape[1:])
        if tensor.shape != like.shape and not rows_may_differ:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, but in the base model {list(like.shape)}"
            )
        result[name] = tensor.to(like.dtype if name in base else _main_dtype(base, tensor))
    return result


def _main_dtype(base: Tensors, tensor: Tensor) -> torch.dtype:
    """The most frequent floating-point dtype of the base, for a tensor that the base lacks."""
    dtypes = [other.dtype for other in base.values() if other.dtype.is_floating_point]
    return max(dtypes, key=dtypes.count, default=tensor.dtype)
