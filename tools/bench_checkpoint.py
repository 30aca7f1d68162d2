"""The cost of saving on a rank, compared with saving without sharding.

    python tools/bench_checkpoint.py                       SmolLM2 on 2 ranks: CPU, or GPUs
    python tools/bench_checkpoint.py --model tiny --ranks 3

Compares gathering the adapter with gathering the full model, and the stall of a foreground save
with that of a background save. The arms alternate within one set of ranks; quote the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_parts
import torch.distributed as dist
from bench_parts import MB, config_of, say, train_state

from launcher.checkpoint.save import Saver
from launcher.commands.fetch import MODELS, fetch
from launcher.config.schema.training import CheckpointConfig
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard, shard_of
from launcher.folders.run import RunDir


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    print(f"{arguments.model}, fp32, fsdp, {arguments.ranks} ranks, {arguments.rounds} rounds")
    for bench in (gathering, saving):
        with tempfile.TemporaryDirectory() as scratch:
            bench_parts.spawn(bench, arguments.ranks, arguments.rounds, folder, Path(scratch))


def gathering(rank_info: RankInfo, rounds: int, folder: Path, scratch: Path) -> None:
    """Measure the seconds and bytes of one gather to rank 0."""
    strategy = train_state(rank_info, config_of(folder, "fsdp", "lora")).strategy
    whole = {name: shard_of(p) for name, p in strategy.model.named_parameters()}
    arms: dict[str, dict[str, Shard]] = {"adapter": strategy.weights(), "whole model": whole}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, shards in arms.items():
            seconds[name].append(_timed(lambda s=shards: strategy.gather(s)))  # type: ignore[misc]
    for name, shards in arms.items():
        size = sum(shard.nbytes for shard in shards.values()) / MB
        say(rank_info, f"  gather {name}: {size:,.1f} MB in {_median(seconds[name]):.3f} s\n")


def saving(rank_info: RankInfo, rounds: int, folder: Path, scratch: Path) -> None:
    """Measure the seconds for which a checkpoint of method=full blocks training."""
    trained = train_state(rank_info, config_of(folder, "fsdp", "full"))
    savers = {}
    for name, later in (("foreground", False), ("background", True)):
        run = RunDir(scratch / name)
        if rank_info.is_main:
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
        say(rank_info, f"  save in the {name}: training waits {_median(times):.3f} s\n")


def _timed(action: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _median(seconds: list[float]) -> float:
    """The median without the first round, which is a warm-up."""
    return statistics.median(seconds[1:])


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
