"""What will be written: every output tensor, where its bytes come from, and its shard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export import dcp, lora
from launcher.export.safetensors_file import StoredTensor, nbytes
from launcher.export.source import Source, base_tensors

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class OutputTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    action: str  # copied | merged | gathered
    parts: Callable[[], Iterator[torch.Tensor]]  # its rows in order, in any number of pieces

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Plan:
    source: Source
    shards: list[list[OutputTensor]]
    max_shard_bytes: int

    @property
    def tensors(self) -> list[OutputTensor]:
        return [tensor for shard in self.shards for tensor in shard]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def file_name(self, shard: int) -> str:
        count = len(self.shards)
        if count == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def describe(self) -> str:
        counts = {
            action: sum(tensor.action == action for tensor in self.tensors)
            for action in ("copied", "merged", "gathered")
        }
        done = ", ".join(f"{count} {action}" for action, count in counts.items() if count)
        return (
            f"{len(self.tensors)} tensors ({done}), {self.nbytes / 1e6:,.1f} MB "
            f"in {len(self.shards)} file(s) of at most {self.max_shard_bytes / 1e6:,.1f} MB"
        )


def make_plan(source: Source, max_shard_bytes: int) -> Plan:
    """Decide everything before the first byte is written. Raises UserError for what cannot be."""
    base = base_tensors(source.base)
    trained = source.adapter or source.shards
    if trained and (scheme := _config(source.base).get("quantization_config")):
        raise UserError(
            f"the base model {source.base} is quantised ({scheme.get('quant_method')}); merging "
            "into it cannot be done yet. Name the 16-bit original with --base"
        )
    if source.shards is not None:
        tensors = _gathered(source, base)
    else:
        deltas = lora.read_adapter(source.adapter, base) if source.adapter else {}
        _refuse_tied(source, base, deltas)
        tensors = [_merged(tensor, deltas.get(name)) for name, tensor in base.items()]
    tensors.sort(key=lambda tensor: _natural(tensor.name))
    return Plan(source, assign(tensors, max_shard_bytes), max_shard_bytes)


def assign(tensors: list[OutputTensor], cap: int) -> list[list[OutputTensor]]:
    """Fill shards in order up to `cap` bytes; only a single larger tensor may pass it."""
    shards: list[list[OutputTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + tensor.nbytes > cap:
            shards.append([])
        shards[-1].append(tensor)
    # Wider dtypes first keeps every tensor aligned to its element size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def parse_size(text: str) -> int:
    """`5GB` is 5·10⁹ bytes, `5GiB` 5·2³⁰."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text} is no size; write 5GB, 500MB or 5GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _merged(weight: StoredTensor, delta: lora.LoraDelta | None) -> OutputTensor:
    if delta is None:
        action, parts = "copied", partial(_copy, weight)
    else:
        action, parts = "merged", partial(delta.merged, weight, weight.dtype)
    return OutputTensor(weight.name, weight.dtype, weight.shape, action, parts)


def _copy(weight: StoredTensor) -> Iterator[torch.Tensor]:
    rows = weight.shape[0] if weight.shape else 1
    step = max(1, (8 << 20) // max(1, weight.row_bytes))
    for first in range(0, rows, step):
        yield weight.rows(first, min(rows, first + step))


def _gathered(source: Source, base: dict[str, StoredTensor]) -> list[OutputTensor]:
    """The tensors of a full run: base names and dtypes, trained values."""
    assert source.shards is not None
    trained = dcp.read_model(source.shards)
    # Some folders store the head although it is the embedding; a tied model is trained once.
    aliases = {"lm_head.weight"} if _config(source.base).get("tie_word_embeddings") else set()
    wanted = base.keys() - (aliases - trained.keys())
    if trained.keys() != wanted:
        apart = sorted(trained.keys() ^ wanted)
        raise UserError(
            f"{source.shards} and the base model {source.base} differ in {len(apart)} tensor(s), "
            f"such as {apart[0]}; is it another model's?"
        )
    outputs = []
    for name, tensor in trained.items():
        if tensor.shape != base[name].shape:
            raise UserError(f"{name} has shape {tensor.shape}, the base model {base[name].shape}")
        dtype = base[name].dtype
        parts = partial(_cast, tensor, dtype)
        outputs.append(OutputTensor(name, dtype, tensor.shape, "gathered", parts))
    return outputs


def _cast(tensor: dcp.ShardedTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    yield tensor.whole().to(dtype)


def _refuse_tied(
    source: Source, base: dict[str, StoredTensor], deltas: dict[str, lora.LoraDelta]
) -> None:
    """Merging into one side of a tied pair would change the other."""
    touched = [name for name in deltas if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if touched and _config(source.base).get("tie_word_embeddings"):
        raise UserError(
            f"the adapter changes {touched[0]}, which is tied to its counterpart "
            "(tie_word_embeddings); merging it cannot be done yet"
        )


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
