"""Writes shards in the format of torch's distributed checkpoint (DCP), one file for each rank.

`dcp.save` of torch sends a description of every part to rank 0 and back in each save, and checks
that no two parts overlap: minutes for hundreds of ranks, and always the same answer. Here ranks
agree once on who writes what, and `.metadata` is made once: the parts of later saves have the same
places.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from launcher.checkpoint.dcp import Tree, leaves
from launcher.distributed.collectives import any_rank, on_all_ranks, root_cause
from launcher.distributed.parts import Chosen, exchange, parts_of
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.io.boxes import Box

Place = tuple[int, Box, int]  # of a part in a rank's file: number of the tensor, box, bytes
Leaf = tuple[tuple[str, ...], Shard]  # the keys of the nested dicts, and the shard there


class DcpWriter:
    """Writes trees of the same shards again and again. All methods are collective over `group`."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._layout: object = None  # of the last save, on this rank
        self._chosen: Chosen = []
        self._places: list[Place] = []
        self._metadata = b""  # on rank 0

    def write(self, tree: Tree, folder: Path) -> None:
        """Write every rank's shards to `folder`; replicas are written once, by one of their ranks.

        Raises UserError with the cause and with the free space on the disk, which torch's zip
        writer does not report.
        """
        found = list(leaves(tree))
        parts = [parts_of(shard) for _, shard in found]
        layout = [
            (path, shard.local.dtype, shard.shape, [box for box, _ in each])
            for (path, shard), each in zip(found, parts, strict=True)
        ]
        if any_rank(layout != self._layout, self._group):
            shards = [shard for _, shard in found]
            self._chosen = exchange(shards, self._group, to_main=False).own
            self._layout, self._places = layout, []
        own = [
            (number, *parts[number][position])
            for number, positions in enumerate(self._chosen)
            for position in positions
        ]
        file = folder / file_name(dist.get_rank(self._group))
        places = on_all_ranks(lambda: _write_parts(own, file), self._group)
        if any_rank(places != self._places, self._group):
            self._places = places
            self._metadata = self._make_metadata(found)
        on_all_ranks(lambda: self._write_metadata(folder / ".metadata"), self._group)

    def _make_metadata(self, found: list[Leaf]) -> bytes:
        """The content of `.metadata` on rank 0, nothing on the other ranks. Collective."""
        is_main = dist.get_rank(self._group) == 0
        by_rank = [self._places] * dist.get_world_size(self._group) if is_main else None
        dist.gather_object(self._places, by_rank, group=self._group, group_dst=0)
        return pickle.dumps(metadata(found, by_rank)) if by_rank else b""

    def _write_metadata(self, file: Path) -> None:
        if self._metadata:
            file.write_bytes(self._metadata)


def file_name(rank: int) -> str:
    """The name that DCP gives the file of a rank."""
    return f"__{rank}_0.distcp"


def metadata(found: list[Leaf], places_by_rank: list[list[Place]]) -> Metadata:
    """What `.metadata` contains for the tensors `found`, whose parts are at `places_by_rank`."""
    names = [".".join(path) for path, _ in found]
    tensors = [
        TensorStorageMetadata(
            TensorProperties(dtype=shard.local.dtype), torch.Size(shard.shape), chunks=[]
        )
        for _, shard in found
    ]
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for rank, places in enumerate(places_by_rank):
        file, begin = file_name(rank), 0
        for number, (offsets, sizes), length in places:
            chunks = tensors[number].chunks
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            index = MetadataIndex(names[number], chunk.offsets, len(chunks))
            stored[index] = _StorageInfo(file, begin, length)
            chunks.append(chunk)
            begin += length
    return Metadata(
        dict(zip(names, tensors, strict=True)),
        planner_data={name: path for name, (path, _) in zip(names, found, strict=True)},
        storage_data=stored,
        version=CURRENT_DCP_VERSION,
    )


def _write_parts(parts: list[tuple[int, Box, torch.Tensor]], file: Path) -> list[Place]:
    """Write one archive behind the other; no file if there is none. Syncing is the caller's."""
    places: list[Place] = []
    if not parts:
        return places
    try:
        with file.open("wb") as stream:
            for number, box, values in parts:
                begin = stream.tell()
                torch.save(_compact(values), stream)
                places.append((number, box, stream.tell() - begin))
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(file.parent).free
        raise UserError(f"{root_cause(error)} ({free / 1e6:,.1f} MB free on its disk)") from error
    return places


def _compact(values: torch.Tensor) -> torch.Tensor:
    """The values on the CPU in a storage of their own: torch.save writes complete storages."""
    local = values.detach().cpu()
    return local if local.untyped_storage().nbytes() == local.nbytes else local.clone()
