"""Who this rank is, and how ranks meet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.distributed import nodes
from launcher.errors import UserError


@dataclass(frozen=True)
class Place:
    """This process among the ranks, as torchrun set it in the environment."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """Read the environment; on a machine with GPUs each local rank takes its own.

    Raises UserError where the launcher counted GPUs and torch finds none: no silent run on CPU.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    counted = int(os.environ.get("SHARDWAY_GPUS", "0"))
    if counted and not cuda:
        raise UserError(
            f"{counted} GPU(s) were counted, and torch {torch.__version__} can use none; install a "
            "CUDA build and a driver for it, or run on CPU with CUDA_VISIBLE_DEVICES="
        )
    return Place(
        rank=int(os.environ["RANK"]),
        local_rank=local_rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
    )


def rendezvous() -> dist.Store:
    """The key-value store of this launch: the agent's where torchrun shares it, rank 0's where
    every node has an agent of its own. Call it once."""
    if "SHARDWAY_MEETING" in os.environ:
        met: dist.Store = nodes.meet(Path(os.environ["SHARDWAY_MEETING"]))
        return met
    store: dist.Store = next(dist.rendezvous("env://"))[0]
    return store


def start(where: Place, store: dist.Store, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the process group: gloo for CPU tensors, NCCL for CUDA tensors.

    Sums over CPU integers (token counts) then never wait for the GPU.
    """
    if where.device.type == "cuda":
        torch.cuda.set_device(where.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if where.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("shardway", store),
        rank=where.rank,
        world_size=where.world_size,
        timeout=timeout,
        device_id=where.device if where.device.type == "cuda" else None,
    )
