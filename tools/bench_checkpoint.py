"""What saving and loading cost a rank, against what one would do without sharding.

    python tools/bench_checkpoint.py                       SmolLM2 on 2 ranks: CPU, or GPUs
    python tools/bench_checkpoint.py --model tiny --ranks 3

Gathering the adapter against gathering the whole model; the stall of a save in the foreground
against one in the background; each rank loading its own slices against every rank loading all.
Arms take turns inside one set of ranks; quote the medians. Loading is measured once an arm, in new
processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import AutoModelForCausalLM

from launcher import worker
from launcher.checkpoint.learner import Learner
from launcher.checkpoint.save import Saver
from launcher.config import Config, store
from launcher.config.training import CheckpointConfig
from launcher.distributed.process_group import Place, start
from launcher.distributed.shards import Shard, shard_of
from launcher.model.fetch import MODELS, fetch
from launcher.run_dir import RunDir

MB = 1e6


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    print(f"{arguments.model}, fp32, fsdp, {arguments.ranks} ranks, {arguments.rounds} rounds")
    for bench in (gathering, saving, loading_slices, loading_all):
        with tempfile.TemporaryDirectory() as scratch:
            words = (bench, arguments.ranks, arguments.rounds, folder, scratch)
            multiprocessing.spawn(_rank, args=words, nprocs=arguments.ranks)


def gathering(place: Place, rounds: int, folder: Path, scratch: Path) -> None:
    """Seconds and bytes of one gather to rank 0."""
    strategy = learner(place, folder, "lora").strategy
    whole = {name: shard_of(p) for name, p in strategy.model.named_parameters()}
    arms: dict[str, dict[str, Shard]] = {"adapter": strategy.weights(), "whole model": whole}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, shards in arms.items():
            seconds[name].append(_timed(lambda s=shards: strategy.gather(s)))  # type: ignore[misc]
    for name, shards in arms.items():
        size = sum(shard.nbytes for shard in shards.values()) / MB
        _say(place, f"gather {name}: {size:,.1f} MB in {_median(seconds[name]):.3f} s")


def saving(place: Place, rounds: int, folder: Path, scratch: Path) -> None:
    """Seconds that training stands still for a checkpoint of method=full."""
    trained = learner(place, folder, "full")
    savers = {}
    for name, later in (("foreground", False), ("background", True)):
        run = RunDir(scratch / name)
        if place.is_main:
            run.checkpoints.mkdir(parents=True)
            run.config.write_text("{}\n")
        dist.barrier()
        savers[name] = Saver(trained, run, CheckpointConfig(async_save=later, keep_last=1))
    stalls: dict[str, list[float]] = {name: [] for name in savers}
    for step in range(1, rounds + 2):
        for name, saver in savers.items():
            stalls[name].append(_timed(lambda s=saver, n=step: s.save(n, 0, None)))  # type: ignore[misc]
            saver.finish()
    for name, times in stalls.items():
        _say(place, f"save in the {name}: training waits {_median(times):.3f} s")


def loading_slices(place: Place, rounds: int, folder: Path, scratch: Path) -> None:
    """Seconds and memory until the model is ready, each rank reading its own slices."""
    with _memory(place, "load own slices"):
        learner(place, folder, "lora")


def loading_all(place: Place, rounds: int, folder: Path, scratch: Path) -> None:
    """The same with `from_pretrained` on every rank."""
    with _memory(place, "load all on every rank"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(place.device)


def learner(place: Place, folder: Path, method: str) -> Learner:
    """The parts of a run, as the worker puts them together."""
    config: Config = store.build(
        {
            "model": {"name_or_path": str(folder)},
            "data": {"path": "none"},
            "method": {"name": method},
            "strategy": {"name": "fsdp"},
            "precision": {"name": "fp32"},
            "optimizer": {"name": "adamw"},
            "scheduler": {"name": "cosine"},
            "cluster": {"name": "local"},
        }
    )
    made: Learner = worker.build_learner(config, folder, place, "none", 100, lambda text: None)
    return made


def _rank(rank: int, bench: Callable[..., None], ranks: int, *rest: Any) -> None:
    torch.set_num_threads(1)
    cuda = torch.cuda.device_count() >= ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    place = Place(rank, rank, ranks, ranks, device)
    rounds, folder, scratch = rest
    start(place, dist.FileStore(f"{scratch}/store", ranks))
    bench(place, rounds, folder, Path(scratch))
    dist.barrier()
    dist.destroy_process_group()


def _timed(action: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _median(seconds: list[float]) -> float:
    """Without the first round, which is for warming up."""
    return statistics.median(seconds[1:])


@contextmanager
def _memory(place: Place, what: str) -> Iterator[None]:
    """Say the seconds, and the largest growth of the process's own memory (RssAnon, and what CUDA
    allocates): pages of mapped files belong to the system and can be dropped."""
    before, peak, done = _own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    host = torch.tensor(max(peak, _own_bytes()) - before)
    dist.all_reduce(host, dist.ReduceOp.MAX)
    text = f"{what}: {seconds:.2f} s, {int(host) / MB:,.0f} MB of memory on the fullest rank"
    if place.device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated() / MB:,.0f} MB on the GPU"
    _say(place, text)


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _say(place: Place, text: str) -> None:
    if place.is_main:
        print(f"  {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2_135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
