"""The options and the result of assembling, and what a full model and a sharded adapter share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from launcher.errors import UserError
from launcher.export import names
from launcher.export.completeness import class_naming
from launcher.export.merge.edits import same_values
from launcher.export.merge.ties import find_embedding_pair
from launcher.export.source import Source
from launcher.export.source_folders import model_home
from launcher.folders.kind import Kind
from launcher.folders.model import MAX_SHARD_BYTES
from launcher.folders.vocabulary import config_changes, config_value
from launcher.io.tensor import Tensor

# Model types whose names in memory are the names on disk. For them transformers, which takes
# seconds to import, is not needed. A test compares each of them with transformers.
SAME_NAMES = ("gpt2", "gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")

Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Options:
    max_shard_bytes: int = MAX_SHARD_BYTES
    dtype: torch.dtype | None = None  # None: the dtype of the base model
    base_format: bool = False  # a quantized base stays quantized, in its own format
    tied: Literal["auto", "untie", "error"] = "auto"
    qlora_base: Literal["original", "dequantized"] = "original"
    device: str = "cpu"  # where the factors of adapters are multiplied
    adapter_only: bool = False
    text_only: bool = False  # of a composite
    modelfile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for options that ask for two results."""
        if self.adapter_only and self.text_only:
            raise UserError(
                "--adapter-only writes an adapter and --text-only a model → choose one of them"
            )
        if self.base_format and (self.adapter_only or self.text_only):
            option = "--adapter-only" if self.adapter_only else "--text-only"
            raise UserError(
                f"--dtype base keeps the format of a whole model, and {option} writes a part of "
                "it → --dtype bf16"
            )


@dataclass(frozen=True)
class Assembled:
    tensors: Tensors  # by their names on disk
    actions: dict[str, str]  # name → what is done: "copied", "gathered", "merged (LoRA)", …
    config: Config  # config.json of the result, or adapter_config.json for --adapter-only
    notes: tuple[str, ...] = ()  # messages for the user


def naming_of(source: Source, options: Options, disk: Iterable[str]) -> names.Naming:
    """The names of the source's model in memory and on disk.

    `disk`: the names of the base's tensors, () if there is no base.
    """
    return names.find_naming(model_home(source), options.trust_remote_code, tuple(disk))


def tied_layers(naming: names.Naming) -> dict[str, str]:
    """Another name of a parameter → the name that is saved, without embedding and head."""
    tied = naming.model.all_tied_weights_keys
    return {alias: name for alias, name in tied.items() if alias not in naming.resizable}


def without_twins(
    source: Source, base: Tensors, tensors: Tensors, config: Config
) -> tuple[Tensors, Config, tuple[str, ...]]:
    """(tensors, config, notes) after removing tied tensors that are stored in addition to those
    they are tied to: a head, the embeddings of an encoder and a decoder.

    They are removed if both are equal, unless the base has them. A head that differs is untied in
    the config.
    """
    pair = find_embedding_pair(tensors, config)
    unknown = tensors.keys() - base.keys() - ({pair.head} if pair else set())
    naming = class_naming(source.path, config) if unknown else None
    tied = naming.model.all_tied_weights_keys if naming else {}
    for alias, name in tied.items():
        if name not in tensors or (pair is not None and alias == pair.head):
            continue
        if alias in base and alias not in tensors:
            tensors = tensors | {alias: tensors[name].renamed(alias)}
        twin = tensors.get(alias)
        if twin is not None and alias not in base and same_values(twin, tensors[name]):
            tensors = {each: tensor for each, tensor in tensors.items() if each != alias}
    return _without_head(tensors, config)


def _without_head(tensors: Tensors, config: Config) -> tuple[Tensors, Config, tuple[str, ...]]:
    """The same for a head and the embedding that it is tied to."""
    pair = find_embedding_pair(tensors, config)
    if pair is None or not pair.tied or pair.head not in tensors:
        return tensors, config, ()
    if same_values(tensors[pair.head], tensors[pair.embedding]):
        return {n: tensor for n, tensor in tensors.items() if n != pair.head}, config, ()
    note = f"{pair.embedding} and {pair.head} differ, and are no longer tied"
    return tensors, config | config_changes(config, tie_word_embeddings=False), (note,)


def with_vocabulary(
    source: Source, base: Tensors, tensors: Tensors, config: Config
) -> tuple[Config, tuple[str, ...]]:
    """(config, notes) with a vocabulary size equal to the rows of the trained embedding, unless the
    base's has as many, or the head has what the config says (some embeddings have rows for images,
    too).

    Raises UserError for fewer rows in a format that does not show whether shards are missing.
    """
    pair, stated = find_embedding_pair(tensors, config), config_value(config, "vocab_size")
    if pair is None or stated is None or (rows := tensors[pair.embedding].shape[0]) == stated:
        return config, ()
    before, head = find_embedding_pair(base, config), tensors.get(pair.head)
    if before is not None and base[before.embedding].shape[0] == rows:
        return config, ()
    if head is not None and head.shape[0] == stated:
        return config, ()
    naming = None if base else class_naming(source.path, config)
    if naming is not None and naming.shapes.get(pair.embedding, ())[:1] == (rows,):
        return config, ()
    if rows < stated and source.kind == Kind.DCP_SAFETENSORS:
        raise UserError(
            f"{source.path}: {pair.embedding} has {rows} rows, but config.json has "
            f"vocab_size={stated}: shards are missing, or the config belongs to another model; "
            "name the right one with --base"
        )
    note = f"the vocabulary was resized from {stated} to {rows} rows"
    return config | config_changes(config, vocab_size=rows), (note,)


def in_dtype(result: Assembled, dtype: torch.dtype | None) -> Assembled:
    """`result` with every tensor in `dtype`, and config.json saying so. None: as they are."""
    if dtype is None:
        return result
    tensors = {name: tensor.to(dtype) for name, tensor in result.tensors.items()}
    actions = {
        name: "cast" if action == "copied" and tensors[name] is not result.tensors[name] else action
        for name, action in result.actions.items()
    }
    config = _config_in_dtype(result.config, dtype)
    return replace(result, tensors=tensors, actions=actions, config=config)


def _config_in_dtype(config: Config, dtype: torch.dtype) -> Config:
    """`config` with `dtype` wherever it names the dtype of the weights."""
    name = str(dtype).removeprefix("torch.")
    result = {
        key: _config_in_dtype(value, dtype)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
    stated = [key for key in ("dtype", "torch_dtype") if key in config]
    return result | dict.fromkeys(stated, name)
