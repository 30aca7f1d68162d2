"""Shards in torch's distributed checkpoint (DCP) format, whatever strategy made them.

A tensor is stored with its true shape, each rank's run of it as a few boxes: any number of ranks
reads it back under any strategy, and so do torch's own tools.
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

from launcher.boxes import boxes
from launcher.distributed.shards import Shard
from launcher.distributed.together import innermost
from launcher.errors import UserError

Tree = dict[str, Any]  # nested by name, Shards at the leaves


def write(tree: Tree, folder: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's runs into `folder`; replicas are written once. Collective. Raises
    UserError with the cause, and with the room on the disk: torch's zip writer does not tell."""
    with _told(lambda: f" ({_free(folder.parent) / 1e6:,.1f} MB free on its disk)"):
        dcp.save(
            _map(_Stored, tree),
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_SavePlanner(),
            process_group=group,
        )


def read(tree: Tree, folder: Path, group: dist.ProcessGroup) -> None:
    """Fill every run of `tree` in place from `folder`. Collective. Raises for a tensor that is not
    there or has another shape."""
    with _told():
        dcp.load(
            _map(_Stored, tree),
            storage_reader=dcp.FileSystemReader(folder),
            planner=_LoadPlanner(),
            process_group=group,
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextmanager
def _told(more: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn DCP's own error, which is no Exception and would pass by every handler, into a sentence
    with its cause and `more`."""
    try:
        yield
    except CheckpointException as error:
        raise UserError(f"{innermost(error)}{more()}") from error


class Staging:
    """Copies of shards in host memory, kept for the next save: at most one save is under way."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def copies(self, tree: Tree) -> Tree:
        """`tree` as it is now. Pinned memory takes what a GPU holds at the speed of the bus."""
        copied = {name: self._copy(value, name) for name, value in tree.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(each, f"{name}/{key}") for key, each in value.items()}
        local, kept = value.local, self._kept.get(name)
        if kept is None:
            kept = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self._kept[name] = kept
        return replace(value, local=kept.copy_(local, non_blocking=True))


@dataclass(frozen=True)
class _Stored:
    """A Shard with the methods by which DCP asks a sharded tensor for its parts."""

    shard: Shard

    def size(self) -> torch.Size:
        return torch.Size(self.shard.shape)

    def box(self, wanted: torch.Size | None) -> torch.Tensor:
        """The box at the offsets `wanted`, as a view of the run."""
        at = 0
        for offsets, sizes in self._boxes():
            count = math.prod(sizes)
            if wanted is None or tuple(wanted) == offsets:
                return self.shard.local[at : at + count].view(sizes)
            at += count
        raise ValueError(f"no box at {wanted}")

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

    def _boxes(self) -> list[Any]:
        return boxes(self.shard.begin, self.shard.local.numel(), self.shard.shape)


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].box(index.offset)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Without the default's copy of what it does not know: it would fill the copies."""
        self.original_state_dict = state_dict
        self.state_dict, self.mappings = flatten_state_dict(state_dict)
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        tensor: torch.Tensor = self.state_dict[index.fqn].box(index.offset)
        return tensor


def _map(function: Any, tree: Tree) -> Tree:
    return {
        key: _map(function, value) if isinstance(value, dict) else function(value)
        for key, value in tree.items()
    }
