"""Shards in torch's distributed checkpoint (DCP) format, whatever strategy made them.

A tensor is stored with its true shape, and each rank's flat range of it as a few boxes. Any number
of ranks can read it with any strategy, and so can torch's own tools.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from launcher.distributed.collectives import on_all_ranks, root_cause
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.io.boxes import Box, intersection
from launcher.io.readers.dcp import Entry, Index, read_index

Tree = dict[str, Any]  # nested dicts by name, with Shards as leaves


def write(tree: Tree, folder: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's shards to `folder`; replicas are written once. Collective.

    Raises UserError with the cause and with the free space on the disk, which torch's zip writer
    does not report.
    """
    with _as_user_error(lambda: f" ({_free_bytes(folder.parent) / 1e6:,.1f} MB free on its disk)"):
        dcp.save(
            _map_leaves(_DcpShard, tree),
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_SavePlanner(),
            process_group=group,
        )


def read(tree: Tree, folder: Path, group: dist.ProcessGroup) -> None:
    """Fill every shard of `tree` in place from `folder`. Collective. Raises UserError for a tensor
    that is missing or has another shape.

    Each rank opens the parts that it needs with the reader of consolidation: torch's own executes
    the pickles of the folder.
    """
    on_all_ranks(partial(read_shards, tree, folder), group)


@torch.no_grad()
def read_shards(tree: Tree, folder: Path) -> None:
    """Fill the shards of this rank. Raises the same errors as `read`."""
    index = read_index(folder)
    for name, shard in _leaves(tree):
        if name not in index.tensors:
            raise UserError(f"{index.file} lists no {name}: it is of another model")
        _fill(shard, name, index.tensors[name], index)


def _fill(shard: Shard, name: str, entry: Entry, index: Index) -> None:
    if entry.shape != tuple(shard.shape):
        raise UserError(
            f"{index.file} lists {name} with the shape {list(entry.shape)}, expected "
            f"{list(shard.shape)}"
        )
    start = filled = 0
    for box in shard.boxes():
        target = shard.local[start : start + math.prod(box[1])].view(box[1])
        start += target.numel()
        for chunk in entry.chunks:
            if (common := intersection(box, (chunk.offsets, chunk.sizes))) is None:
                continue
            values = entry.read_chunk(chunk, name).read_all()
            part = values[_slices(common, chunk.offsets)]
            target[_slices(common, box[0])].copy_(part)
            filled += part.numel()
    if filled != shard.local.numel():
        raise UserError(f"{index.file} lists {filled} of {shard.local.numel()} elements of {name}")


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """The box in a tensor whose first element is at `origin`."""
    return tuple(
        slice(offset - first, offset - first + size)
        for offset, size, first in zip(*box, origin, strict=True)
    )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextmanager
def _as_user_error(details: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn DCP's CheckpointException into a UserError with its cause and `details`. It is not an
    Exception, so no other handler would catch it."""
    try:
        yield
    except CheckpointException as error:
        raise UserError(f"{root_cause(error)}{details()}") from error


class Staging:
    """Copies of shards in host memory. The memory is reused by the next save: only one save may be
    in progress."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, tree: Tree) -> Tree:
        """A copy of `tree` as it is now. Memory for GPU tensors is pinned: the copy is as fast as
        the bus."""
        copied = {name: self._copy(value, name) for name, value in tree.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Shard | Tree, name: str) -> Shard | Tree:
        if isinstance(value, dict):
            return {key: self._copy(each, f"{name}/{key}") for key, each in value.items()}
        local, buffer = value.local, self._buffers.get(name)
        if buffer is None:
            buffer = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self._buffers[name] = buffer
        return replace(value, local=buffer.copy_(local, non_blocking=True))


@dataclass(frozen=True)
class _DcpShard:
    """A Shard with the methods that DCP calls on a sharded tensor."""

    shard: Shard

    def size(self) -> torch.Size:
        return torch.Size(self.shard.shape)

    def box(self, offsets: torch.Size | None) -> torch.Tensor:
        """The box at `offsets`, as a view of `local`."""
        start = 0
        for box_offsets, sizes in self.shard.boxes():
            count = math.prod(sizes)
            if offsets is None or tuple(offsets) == box_offsets:
                return self.shard.local[start : start + count].view(sizes)
            start += count
        raise ValueError(f"no box at {offsets}")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in self.shard.boxes()
        ]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.shard.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        box: torch.Tensor = self.state_dict[index.fqn].box(index.offset)
        return box


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Shard]]:
    """The shards by the names that DCP gives them: those of the nested dicts, with dots."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _map_leaves(function: Callable[[Shard], Any], tree: Tree) -> Tree:
    return {
        key: _map_leaves(function, value) if isinstance(value, dict) else function(value)
        for key, value in tree.items()
    }
