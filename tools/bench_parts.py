"""Shared code of the multi-rank benchmarks: ranks, the parts of a run, memory measurement."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  so that no library loads while memory is measured
import torch
import torch.distributed as dist
from torch import multiprocessing

from launcher.config import Config, store
from launcher.distributed.process_group import RankInfo, init_process_group
from launcher.training.build import build_train_state
from launcher.training.state import TrainState

MB = 1e6
_console = 1


def spawn(bench: Callable[..., None], ranks: int, *words: Any) -> None:
    """Run `bench(rank_info, *words)` in `ranks` new processes, on GPUs if there are enough."""
    # Return freed memory to the system at once, so that the peak counts only memory in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_rank, args=(bench, ranks, store.port, *words), nprocs=ranks)


def _rank(rank: int, bench: Callable[..., None], ranks: int, port: int, *words: Any) -> None:
    global _console
    _console = os.dup(1)
    os.dup2(2, 1)  # libraries print to stdout
    torch.set_num_threads(1)
    cuda = torch.cuda.device_count() >= ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    rank_info = RankInfo(rank, rank, ranks, ranks, device)
    init_process_group(rank_info, dist.TCPStore("127.0.0.1", port), minutes=10)
    bench(rank_info, *words)
    dist.barrier()
    dist.destroy_process_group()


def alone() -> RankInfo:
    """Make this process the only rank of a process group, on the first GPU if there is one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    cuda = torch.cuda.is_available()
    rank_info = RankInfo(0, 0, 1, 1, torch.device("cuda", 0) if cuda else torch.device("cpu"))
    init_process_group(rank_info, dist.HashStore(), minutes=10)
    return rank_info


def config_of(
    folder: Path, strategy: str, method: str, precision: str = "fp32", **sections: dict[str, Any]
) -> Config:
    """The config of a run on the model in `folder`, with `sections` replaced."""
    config: Config = store.build(
        {
            "model": {"name_or_path": str(folder)},
            "data": {"path": "none"},
            "method": {"name": method},
            "strategy": {"name": strategy},
            "precision": {"name": precision},
            "optimizer": {"name": "adamw"},
            "scheduler": {"name": "cosine"},
            "cluster": {"name": "local"},
            **sections,
        }
    )
    return config


def train_state(
    rank_info: RankInfo, config: Config, say: Callable[[str], None] = lambda text: None
) -> TrainState:
    """Build the parts of a run as the worker does. `say` receives the log lines."""
    folder = Path(config.model.name_or_path)
    made: TrainState = build_train_state(config, folder, rank_info, "none", 100, say)
    return made


@dataclass
class Memory:
    """Time and memory of the rank that needed most, set when the measured block ends."""

    seconds: float = 0.0
    host: int = 0  # bytes: growth of the process's own memory at its peak
    gpu: int = 0  # bytes: peak of allocated memory

    def __str__(self) -> str:
        gpu = f", {self.gpu / MB:,.0f} MB on the GPU" if self.gpu else ""
        return f"{self.seconds:.2f} s, {self.host / MB:,.0f} MB on the fullest rank{gpu}"


@contextmanager
def memory(rank_info: RankInfo) -> Iterator[Memory]:
    """Measure the peak memory and time of the block inside. Collective.

    Host memory is RssAnon: pages of mapped files belong to the system and can be dropped.
    """
    used, before, peak, done = Memory(), _own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    began = time.perf_counter()
    try:
        yield used
    finally:
        used.seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    gpu = torch.cuda.max_memory_allocated() if rank_info.device.type == "cuda" else 0
    most = torch.tensor([max(peak, _own_bytes()) - before, gpu])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    used.host, used.gpu = most.tolist()


def say(rank_info: RankInfo, text: str) -> None:
    """Print from rank 0 only, on the original stdout."""
    if rank_info.is_main:
        os.write(_console, text.encode())


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
