"""What all ranks agree on before there is a process group: rank 0 decides, through the store."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from launcher.distributed.rendezvous import wait_for_ranks
from launcher.errors import UserError


def agree(
    store: dist.Store,
    rank: int,
    world_size: int,
    topic: str,
    said: str,
    decide: Callable[[list[str]], str],
    minutes: float,
) -> str:
    """What rank 0 makes with `decide` of what each rank has `said`, in the order of the ranks.

    `topic` is used once per round. Returns the same on all ranks. If `decide` raises UserError, all
    ranks raise one with its message; so does a rank that waits for another in vain for `minutes`.
    """
    name = f"shardway/{topic}"
    if rank == 0:
        verdict = _decide(store, world_size, name, said, decide, minutes)
        store.set(f"{name}/verdict", verdict)
        wait_for_ranks(store, [f"{name}/heard/{other}" for other in range(1, world_size)], minutes)
    else:
        store.set(f"{name}/said/{rank}", said)
        wait_for_ranks(store, [f"{name}/verdict"], minutes)
        verdict = store.get(f"{name}/verdict").decode()
        store.set(f"{name}/heard/{rank}", "")
    kind, _, text = verdict.partition(" ")
    if kind == "refused":
        raise UserError(text)
    return text


def _decide(
    store: dist.Store,
    world_size: int,
    name: str,
    said: str,
    decide: Callable[[list[str]], str],
    minutes: float,
) -> str:
    """`decided TEXT`, or `refused MESSAGE`."""
    keys = [f"{name}/said/{rank}" for rank in range(1, world_size)]
    try:
        wait_for_ranks(store, keys, minutes)
        return f"decided {decide([said, *(store.get(key).decode() for key in keys)])}"
    except UserError as error:
        return f"refused {error}"
