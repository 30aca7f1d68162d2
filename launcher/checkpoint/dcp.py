"""Shards in torch's distributed checkpoint (DCP) format, whatever strategy made them.

A tensor is stored with its true shape, and each rank's part of it as a few boxes. Any number of
ranks can read it with any strategy, and so can torch's own tools. `dcp_writer.py` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.distributed.collectives import on_all_ranks
from launcher.distributed.parts import parts_of
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.io.boxes import Box, intersection
from launcher.io.readers.dcp import Entry, Index, read_index

Tree = dict[str, Any]  # nested dicts by name, with Shards as leaves


def read(tree: Tree, folder: Path, group: dist.ProcessGroup | None = None) -> None:
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
    for path, shard in leaves(tree):
        name = ".".join(path)
        if name not in index.tensors:
            raise UserError(f"{index.file} lists no {name}: it is of another model")
        _fill(shard, name, index.tensors[name], index)


def _fill(shard: Shard, name: str, entry: Entry, index: Index) -> None:
    if entry.shape != tuple(shard.shape):
        raise UserError(
            f"{index.file} lists {name} with the shape {list(entry.shape)}, expected "
            f"{list(shard.shape)}"
        )
    filled = 0
    for box, target in parts_of(shard):
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


def leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Shard]]:
    """The shards with the keys of the nested dicts. DCP's name of a shard is these, with dots."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
