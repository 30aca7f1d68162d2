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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from launcher.distributed.collectives import root_cause
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.io.boxes import Box, boxes

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
    that is missing or has another shape."""
    with _as_user_error():
        dcp.load(
            _map_leaves(_DcpShard, tree),
            storage_reader=dcp.FileSystemReader(folder),
            planner=_LoadPlanner(),
            process_group=group,
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
        """The box at `offsets`, as a view of the flat range."""
        start = 0
        for box_offsets, sizes in self._boxes():
            count = math.prod(sizes)
            if offsets is None or tuple(offsets) == box_offsets:
                return self.shard.local[start : start + count].view(sizes)
            start += count
        raise ValueError(f"no box at {offsets}")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in self._boxes()
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

    def _boxes(self) -> list[Box]:
        return boxes(self.shard.begin, self.shard.local.numel(), self.shard.shape)


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        box: torch.Tensor = self.state_dict[index.fqn].box(index.offset)
        return box


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The default method would copy values of unknown types, and then fill the copies."""
        self.original_state_dict = state_dict
        self.state_dict, self.mappings = flatten_state_dict(state_dict)
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        box: torch.Tensor = self.state_dict[index.fqn].box(index.offset)
        return box


def _map_leaves(function: Callable[[Shard], Any], tree: Tree) -> Tree:
    return {
        key: _map_leaves(function, value) if isinstance(value, dict) else function(value)
        for key, value in tree.items()
    }
