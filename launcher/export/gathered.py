"""The shards of a whole model, as the files of a model folder: names, dtypes, ties, vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from launcher.errors import UserError
from launcher.export import names
from launcher.export.merge.edits import same_values
from launcher.export.merge.ties import changed, find_ends, setting
from launcher.export.readers import dcp_safetensors
from launcher.export.readers.found import Found
from launcher.export.source import Source
from launcher.export.tensor import Tensor

# In-memory names are the names on disk: transformers, which takes seconds to import, need not be
# asked. A test asks it for each of them.
SAME_NAMES = ("gpt2", "gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")

Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Options:
    max_shard_bytes: int = 5 * 10**9
    dtype: torch.dtype | None = None  # None: the base model's own
    tied: Literal["auto", "untie", "error"] = "auto"
    qlora_base: Literal["original", "dequantized"] = "original"
    device: str = "cpu"  # where the factors of adapters are multiplied
    adapter_only: bool = False
    modelfile: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Assembled:
    tensors: Tensors  # by their names on disk
    actions: dict[str, str]
    config: Config  # of the result
    notes: tuple[str, ...] = ()


def gathered(
    source: Source, base: Tensors, found: Found, config: Config, options: Options
) -> Assembled:
    """The trained tensors by the names on disk, in the dtypes of the base or of the config.

    `base` is empty where no base folder is known. Raises UserError when the tensors are not those
    of the model that base and config describe.
    """
    whole = found.tensors
    if source.partial:
        whole = _in_memory(source, base, whole, options) | whole
    tensors, config, notes = without_twin(whole, config)
    config, more = with_vocabulary(source, tensors, config)
    # That format cannot tell by itself that a rank's files are missing: shapes must be compared.
    known = config.get("model_type") in SAME_NAMES and source.kind != dcp_safetensors.KIND
    if tensors.keys() != base.keys() and not known:
        tensors = naming_of(source, options, base).to_disk(tensors)
    tensors |= {
        alias: tensors[kept].called(alias)
        for alias, kept in found.aliases.items()
        if kept in tensors and (alias in base or not setting(config, "tie_word_embeddings"))
    }
    if base:
        tensors = _as_in_base(source, base, tensors, config)
    else:
        stated = _stated_dtype(config)
        tensors = {name: tensor.to(stated or tensor.dtype) for name, tensor in tensors.items()}
    actions = {
        name: "copied" if name in base and tensor is base[name] else "gathered"
        for name, tensor in tensors.items()
    }
    return Assembled(tensors, actions, config, (*notes, *more))


def _in_memory(source: Source, base: Tensors, trained: Tensors, options: Options) -> Tensors:
    """The base by the names in memory, which are those of `trained`."""
    if trained.keys() <= base.keys():
        return base
    return naming_of(source, options, base).to_memory(base)


def naming_of(source: Source, options: Options, disk: Iterable[str]) -> names.Naming:
    """How names in memory become those on disk; like `disk`'s where a base is known."""
    where = source.base or next(f for f in source.companions if (f / "config.json").is_file())
    return names.find_naming(where, options.trust_remote_code, tuple(disk))


def without_twin(tensors: Tensors, config: Config) -> tuple[Tensors, Config, tuple[str, ...]]:
    """A tied head that is stored too is left out when it equals the embedding; when it does not,
    the two are no longer tied."""
    ends = find_ends(tensors, config)
    if ends is None or not ends.tied or ends.head not in tensors:
        return tensors, config, ()
    if same_values(tensors[ends.head], tensors[ends.embedding]):
        return {n: tensor for n, tensor in tensors.items() if n != ends.head}, config, ()
    note = f"{ends.embedding} and {ends.head} differ, and are no longer tied"
    return tensors, config | changed(config, tie_word_embeddings=False), (note,)


def with_vocabulary(
    source: Source, tensors: Tensors, config: Config
) -> tuple[Config, tuple[str, ...]]:
    """The config with as many tokens as the trained embedding has rows."""
    ends, stated = find_ends(tensors, config), setting(config, "vocab_size")
    if ends is None or stated is None or (rows := tensors[ends.embedding].shape[0]) == stated:
        return config, ()
    if rows < stated and source.kind == dcp_safetensors.KIND:
        raise UserError(
            f"{source.path}: {ends.embedding} has {rows} rows, config.json vocab_size={stated}: "
            "shards are missing, or it is another model's; name the right one with --base"
        )
    note = f"the vocabulary was resized from {stated} to {rows} rows"
    return config | changed(config, vocab_size=rows), (note,)


def _as_in_base(source: Source, base: Tensors, tensors: Tensors, config: Config) -> Tensors:
    """The trained tensors in the base's dtypes, after a check that they are the same model's."""
    # Some folders store the head although it is the embedding; a tied model is trained once. An
    # untied head of a base that was tied is the trained one.
    heads = {"lm_head.weight"}
    apart = tensors.keys() ^ base.keys()
    if setting(config, "tie_word_embeddings"):
        apart -= heads - tensors.keys()
    else:
        apart -= heads - base.keys()
    if apart:
        raise UserError(
            f"{source.path} and the base model {source.base} differ in {len(apart)} tensor(s), "
            f"such as {min(apart)}; is it another model's?"
        )
    result = {}
    for name, tensor in tensors.items():
        like = base.get(name, tensor)
        rows_may_grow = tensor.shape[1:] == like.shape[1:] and tensor.shape[0] == config.get(
            "vocab_size"
        )
        if tensor.shape != like.shape and not rows_may_grow:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, the base model {list(like.shape)}"
            )
        result[name] = tensor.to(like.dtype if name in base else _float_of(base, tensor))
    return result


def _float_of(base: Tensors, tensor: Tensor) -> torch.dtype:
    """The dtype of most of the base, for a tensor that it has not."""
    dtypes = [each.dtype for each in base.values() if each.dtype.is_floating_point]
    return max(dtypes, key=dtypes.count, default=tensor.dtype)


def _stated_dtype(config: Config) -> torch.dtype | None:
    text = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(text).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None
