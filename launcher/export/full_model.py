"""Turns the gathered shards of a full model into the tensors of a model folder: names, dtypes,
ties, vocabulary."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn

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
from launcher.export.merge.ties import HEAD, find_embedding_pair
from launcher.export.source import Source
from launcher.export.source_folders import model_home
from launcher.folders.kind import Kind
from launcher.folders.vocabulary import config_changes, config_value
from launcher.io.readers.found import FoundModel
from launcher.io.stated_dtype import stated_dtype
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
        gathered = _completed(source, base, gathered, options)
    tensors, config, tie_notes = without_twins(source, base, gathered, config)
    config, vocabulary_notes = with_vocabulary(source, base, tensors, config)
    # DCP_SAFETENSORS does not show whether a rank's files are missing: shapes must be compared.
    known = config.get("model_type") in SAME_NAMES and source.kind != Kind.DCP_SAFETENSORS
    naming, copies = None, {HEAD}
    if tensors.keys() != base.keys() and not (known and base.keys() <= tensors.keys() | {HEAD}):
        naming = naming_of(source, options, base)
    if not base:
        tensors = _in_stated_dtype(tensors, config, naming)
    if naming is not None:
        tensors = naming.to_disk(naming.unbuilt(base) | _as_stored(naming, tensors))
        copies |= naming.model.all_tied_weights_keys.keys()
    tensors |= {
        alias: tensors[name].renamed(alias)
        for alias, name in found.aliases.items()
        if name in tensors and (alias in base or not config_value(config, "tie_word_embeddings"))
    }
    if base:
        tensors = _in_base_dtypes(source, base, tensors, config, copies)
    config, padding_notes = _with_padding_row(source, base, tensors, config, options)
    actions = {
        name: "copied" if name in base and tensor is base[name] else "gathered"
        for name, tensor in tensors.items()
    }
    notes += (*tie_notes, *vocabulary_notes, *padding_notes)
    return Assembled(tensors, actions, config, notes)


def _completed(source: Source, base: Tensors, trained: Tensors, options: Options) -> Tensors:
    """The model by its names in memory: `trained`, and the base's tensors for the rest. Raises
    UserError without a base."""
    if not base:
        raise UserError(
            f"{source.path} contains a part of the model that {model_home(source) / 'config.json'} "
            "describes, and the other parts are in its base; name that with --base FOLDER"
        )
    if trained.keys() <= base.keys():
        return base | trained
    naming = naming_of(source, options, base)
    trained, ties = _as_stored(naming, trained), naming.model.all_tied_weights_keys
    memory = naming.to_memory(base).items()
    return {name: tensor for name, tensor in memory if ties.get(name) not in trained} | trained


def _as_stored(naming: names.Naming, trained: Tensors) -> Tensors:
    """Tied parameters by the names that the base has, or `save_pretrained` writes: training names
    them as the one that its class registers first."""
    result = dict(trained)
    for alias, name in naming.model.all_tied_weights_keys.items():
        only_alias_stored = alias in naming.stored and name not in naming.stored
        if alias in result and name not in result and not only_alias_stored:
            result[name] = result.pop(alias).renamed(name)
    return result


def _in_base_dtypes(
    source: Source, base: Tensors, tensors: Tensors, config: Config, copies: Set[str]
) -> Tensors:
    """The trained tensors in the base's dtypes. `copies`: names that a tied model does not need.
    Raises UserError if names or shapes differ."""
    # Some folders also store a tied head, but a tied model trains only one tensor. If a tied base
    # was untied, the head is the trained one.
    differing = tensors.keys() ^ base.keys()
    if config_value(config, "tie_word_embeddings"):
        differing -= copies - tensors.keys()
    else:
        differing -= {HEAD} - base.keys()
    if differing:
        raise UserError(
            f"{source.path} and the base model {source.base} differ in {len(differing)} tensor(s), "
            f"such as {min(differing)} → --base with the model that SOURCE was trained from"
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


def _with_padding_row(
    source: Source, base: Tensors, tensors: Tensors, config: Config, options: Options
) -> tuple[Config, tuple[str, ...]]:
    """(config, notes) without a pad_token_id for whose sake transformers would discard a trained
    row of the embedding."""
    padding, pair = config_value(config, "pad_token_id"), find_embedding_pair(tensors, config)
    if padding is None or pair is None or config.get("model_type") in SAME_NAMES:
        return config, ()
    embedding = tensors[pair.embedding]
    if not 0 <= padding < embedding.rows or not embedding.read(padding, padding + 1).any():
        return config, ()
    model = naming_of(source, options, base).model
    if not _resets_padding(model):
        return config, ()
    note = (
        f"config.json: pad_token_id={padding} is now null, because with it {type(model).__name__} "
        f"sets that row of {pair.embedding} to zero each time transformers loads it; the tokenizer "
        "still pads with that token"
    )
    return config | config_changes(config, pad_token_id=None), (note,)


def _resets_padding(model: Any) -> bool:
    """Whether loading a model of this class clears the row of the padding token, although the files
    have it: its `_init_weights` then ignores the mark of a loaded tensor."""
    probe: Any = nn.Embedding(2, 1, padding_idx=0)
    nn.init.ones_(probe.weight)
    probe.weight._is_hf_initialized = True
    with torch.no_grad():
        model._init_weights(probe)
    return not model.is_custom_code() and not bool(probe.weight.all())


def _main_dtype(base: Tensors, tensor: Tensor) -> torch.dtype:
    """The most frequent floating-point dtype of the base, for a tensor that the base lacks."""
    dtypes = [other.dtype for other in base.values() if other.dtype.is_floating_point]
    return max(dtypes, key=dtypes.count, default=tensor.dtype)


def _in_stated_dtype(tensors: Tensors, config: Config, naming: names.Naming | None) -> Tensors:
    """The tensors by their names in memory, in the dtype that the config states, except those that
    the class keeps in fp32. `naming`: None for a class that keeps none."""
    if (dtype := stated_dtype(config)) is None:
        return tensors
    kept = names.kept_in_fp32(naming.model, tensors, dtype) if naming else frozenset()
    return {name: t if name in kept else t.to(dtype) for name, t in tensors.items()}
