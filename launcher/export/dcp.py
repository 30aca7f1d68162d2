"""A model saved by torch's distributed checkpoint (DCP), read without executing its pickles.

`.metadata` is a pickle of plain dataclasses: only those classes are admitted. Each chunk in a
`.distcp` file is a `torch.save` archive of its own at [offset, offset + length)
(torch.distributed.checkpoint.filesystem), read with `weights_only=True`.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError

ADMITTED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}


@dataclass(frozen=True)
class Chunk:
    file: Path
    begin: int
    length: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor whose parts lie in several files."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def whole(self) -> torch.Tensor:
        """All parts put together. Raises UserError when they do not cover the tensor exactly."""
        covered = sum(math.prod(chunk.shape) for chunk in self.chunks)
        if covered != math.prod(self.shape) or _overlap(self.chunks):
            raise UserError(f"{self.name}: its chunks do not tile the shape {self.shape}")
        result = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            box = tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.shape, strict=True))
            result[box] = _read(chunk, self.name)
        return result


def read_model(folder: Path) -> dict[str, ShardedTensor]:
    """Name → tensor of the entries under `model`. Raises UserError when the save is not whole."""
    file = folder / ".metadata"
    try:
        metadata = _AdmittedOnly(io.BytesIO(file.read_bytes())).load()
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise UserError(f"{file} is no DCP metadata: {error}") from error
    chunks: dict[str, list[Chunk]] = {}
    for index, stored in metadata.storage_data.items():
        path = folder / stored.relative_path
        if not path.is_file():
            raise UserError(f"{path} is missing; {file} lists it")
        entry = metadata.state_dict_metadata[index.fqn]
        if not hasattr(entry, "chunks"):
            continue  # bytes, not a tensor
        offsets = tuple(index.offset) if index.offset is not None else (0,) * len(entry.size)
        shape = next(tuple(c.sizes) for c in entry.chunks if tuple(c.offsets) == offsets)
        chunk = Chunk(path, stored.offset, stored.length, offsets, shape)
        chunks.setdefault(index.fqn, []).append(chunk)
    return {
        path[-1]: ShardedTensor(
            path[-1], entry.properties.dtype, tuple(entry.size), tuple(chunks.get(name, ()))
        )
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks") and (path := metadata.planner_data[name])[0] == "model"
    }


class _AdmittedOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no DCP metadata needs")
        return super().find_class(module, name)


def _read(chunk: Chunk, name: str) -> torch.Tensor:
    with chunk.file.open("rb") as file:
        file.seek(chunk.begin)
        data = file.read(chunk.length)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{chunk.file}: the part of {name} cannot be read: {error}") from error
    if tuple(tensor.shape) != chunk.shape:
        raise UserError(f"{chunk.file}: {name} has a part of {tuple(tensor.shape)}")
    return tensor  # type: ignore[no-any-return]


def _overlap(chunks: tuple[Chunk, ...]) -> bool:
    return any(
        all(
            max(one.offsets[d], two.offsets[d])
            < min(one.offsets[d] + one.shape[d], two.offsets[d] + two.shape[d])
            for d in range(len(one.shape))
        )
        for one, two in itertools.combinations(chunks, 2)
    )
