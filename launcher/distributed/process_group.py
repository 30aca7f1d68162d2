"""The rank of this process, and the process group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.errors import UserError
from launcher.io.current_device import use_device


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks, as torchrun describes it in the environment."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def read_rank_info() -> RankInfo:
    """Read the environment. With GPUs, the device is the GPU of the local rank.

    Raises UserError if the launcher found GPUs and torch finds none: a run never falls back to CPU.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    gpus = int(os.environ.get("SHARDWAY_GPUS", "0"))
    if gpus and not cuda:
        raise UserError(
            f"the launcher found {gpus} GPU(s), but torch {torch.__version__} cannot use any; "
            "install a CUDA build of torch and a driver for it, or set CUDA_VISIBLE_DEVICES= to "
            "run on CPU"
        )
    return RankInfo(
        rank=int(os.environ["RANK"]),
        local_rank=local_rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
    )


def init_process_group(rank_info: RankInfo, store: dist.Store, minutes: float) -> None:
    """Join the process group: gloo for CPU tensors, NCCL for CUDA tensors. A rank waits `minutes`
    for the others in one message.

    Sums of CPU integers (token counts) then never wait for the GPU.
    """
    on_gpu = rank_info.device.type == "cuda"
    use_device(rank_info.device)
    timeout = timedelta(minutes=minutes)
    store.set_timeout(timeout)  # backends exchange addresses through it
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("shardway", store),
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=timeout,
        device_id=rank_info.device if on_gpu else None,
    )
