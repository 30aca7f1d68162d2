"""Gather sharded tensors in the host memory of rank 0, a bounded message at a time.

Parts travel over the CPU: no rank needs memory on its GPU, and a thread can gather over a group of
its own while training goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from launcher.distributed.collectives import on_all_ranks
from launcher.distributed.parts import exchange, parts_of
from launcher.distributed.shards import Shard
from launcher.io.boxes import Box

MESSAGE_BYTES = 1 << 26  # at most, or one row of a tensor
ALIGNMENT = 16  # of a tensor in a message

Views = list[torch.Tensor]  # of parts of tensors: to send, or to receive into


def gather_to_main(
    shards: Mapping[str, Shard], group: dist.ProcessGroup | None = None
) -> dict[str, torch.Tensor] | None:
    """The full tensors on the CPU of rank 0, None on the other ranks. Collective.

    Raises UserError if the ranks do not have all elements, or if rank 0 lacks memory.
    """
    is_main = dist.get_rank(group) == 0
    shares = exchange(list(shards.values()), group, to_main=True)
    full = on_all_ranks(lambda: _allocate(shards) if is_main else {}, group)
    parts = [[values for _, values in parts_of(shard)] for shard in shards.values()]
    sent = [parts[number][at] for number, each in enumerate(shares.own) for at in each]
    if not is_main:
        for message in _messages(sent):
            buffer = _empty_buffer(message)
            for piece, place in _places(message, buffer):
                place.copy_(piece)
            dist.send(buffer, group=group, group_dst=0)
        return None
    tensors = list(full.values())
    for rank, (layout, chosen) in enumerate(zip(shares.layouts, shares.chosen, strict=True)):
        received = [
            tensors[number][_slices(layout[number][at])]
            for number, each in enumerate(chosen)
            for at in each
        ]
        if rank == 0:
            for target, values in zip(received, sent, strict=True):
                target.copy_(values)
            continue
        for message in _messages(received):
            buffer = _empty_buffer(message)
            dist.recv(buffer, group=group, group_src=rank)
            for piece, place in _places(message, buffer):
                piece.copy_(place)
    return full


def _allocate(shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
    return {n: torch.empty(s.shape, dtype=s.local.dtype) for n, s in shards.items()}


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))


def _messages(views: Iterable[torch.Tensor]) -> Iterator[Views]:
    """Cut large views into groups of rows, and collect small ones, in order.

    The messages of sender and receiver are the same: shapes and dtypes of their views are.
    """
    message: Views = []
    size = 0
    for view in views:
        for piece in _rows(view):
            if message and size + _room(piece) > MESSAGE_BYTES:
                yield message
                message, size = [], 0
            message.append(piece)
            size += _room(piece)
    if message:
        yield message


def _rows(view: torch.Tensor) -> Sequence[torch.Tensor]:
    """`view` in groups of as many rows as fit into a message, and at least one."""
    if view.nbytes <= MESSAGE_BYTES:
        return (view,)
    return torch.split(view, max(1, MESSAGE_BYTES * len(view) // view.nbytes))


def _room(piece: torch.Tensor) -> int:
    """Bytes of a piece in a message."""
    return -(-piece.nbytes // ALIGNMENT) * ALIGNMENT


def _empty_buffer(message: Views) -> torch.Tensor:
    return torch.empty(sum(map(_room, message)), dtype=torch.uint8)


def _places(message: Views, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each piece of a message, and its place in `buffer` as a tensor of the same shape."""
    begin = 0
    for piece in message:
        values = buffer[begin : begin + piece.nbytes].view(piece.dtype).view(piece.shape)
        yield piece, values
        begin += _room(piece)
