"""The cost of saving on a rank, compared with saving without sharding.

    python tools/bench_checkpoint.py                       SmolLM2 on 2 ranks: CPU, or GPUs
    python tools/bench_checkpoint.py --model tiny --ranks 3

Compares gathering the adapter with gathering the full model, and the stall of a foreground save
with that of a background save. The arms alternate within one set of ranks; quote the medians. Then
measures what rank 0 does once in a run, before the first save of many ranks, on their layouts
alone.
"""

from __future__ import annotations

import argparse
import math
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_parts
import torch
import torch.distributed as dist
from bench_parts import MB, config_of, say, train_state

from launcher.checkpoint.dcp_writer import Leaf, Place, metadata
from launcher.checkpoint.save import Saver
from launcher.commands.fetch import MODELS, fetch
from launcher.config.schema.training import CheckpointConfig, LaunchConfig
from launcher.distributed.gather import gather_to_main
from launcher.distributed.parts import Chosen, Layout, choose
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard, shard_of
from launcher.folders.run import RunDir
from launcher.io.boxes import boxes

# The matrices of a layer of Llama-70B, and its two norms.
LAYER = (
    [(8192, 8192)] * 2
    + [(1024, 8192)] * 2
    + [(28672, 8192)] * 2
    + [(8192, 28672), (8192,), (8192,)]
)


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    print(f"{arguments.model}, fp32, fsdp, {arguments.ranks} ranks, {arguments.rounds} rounds")
    for bench in (gathering, saving):
        with tempfile.TemporaryDirectory() as scratch:
            bench_parts.spawn(bench, arguments.ranks, arguments.rounds, folder, Path(scratch))
    planning(arguments.planned_ranks, arguments.planned_layers)


def gathering(rank_info: RankInfo, rounds: int, folder: Path, scratch: Path) -> None:
    """Measure the seconds and bytes of one gather to rank 0."""
    strategy = train_state(rank_info, config_of(folder, "fsdp", "lora")).strategy
    whole = {name: shard_of(p) for name, p in strategy.model.named_parameters()}
    arms: dict[str, dict[str, Shard]] = {"adapter": strategy.weights(), "whole model": whole}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, shards in arms.items():
            seconds[name].append(_timed(lambda s=shards: gather_to_main(s)))  # type: ignore[misc]
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
        config = CheckpointConfig(async_save=later, keep_last=1)
        savers[name] = Saver(trained, run, config, LaunchConfig())
    stalls: dict[str, list[float]] = {name: [] for name in savers}
    for step in range(1, rounds + 2):
        for name, saver in savers.items():
            stalls[name].append(_timed(lambda s=saver, n=step: s.save(n, 0, None)))  # type: ignore[misc]
            saver.finish()
    for name, times in stalls.items():
        say(rank_info, f"  save in the {name}: training waits {_median(times):.3f} s\n")


def planning(ranks: int, layers: int) -> None:
    """Measure the CPU seconds of rank 0 for weights and two moments, sharded by rows."""
    shapes: list[tuple[int, ...]] = LAYER * layers * 3
    sent = [pickle.dumps(_layout(shapes, rank, ranks)) for rank in range(ranks)]
    begin = time.process_time()
    layouts = [pickle.loads(each) for each in sent]
    received = time.process_time()
    chosen = choose(layouts, shapes, to_main=False)
    agreed = time.process_time()
    shards = [Shard(torch.empty(0), 0, shape) for shape in shapes]
    found: list[Leaf] = [((str(number),), shard) for number, shard in enumerate(shards)]
    size = len(pickle.dumps(metadata(found, list(map(_places, layouts, chosen)))))
    end = time.process_time()
    print(
        f"  first save of {layers} layers on {ranks} ranks: {sum(map(len, sent)) / MB:,.1f} MB "
        f"unpickled in {received - begin:.2f} s, agreed in {agreed - received:.2f} s, .metadata of "
        f"{size / MB:,.1f} MB made in {end - agreed:.2f} s"
    )


def _layout(shapes: list[tuple[int, ...]], rank: int, ranks: int) -> Layout:
    layout = []
    for shape in shapes:
        rows, row = -(-shape[0] // ranks), math.prod(shape[1:])
        begin, end = (min(rows * each, shape[0]) * row for each in (rank, rank + 1))
        layout.append(boxes(begin, end - begin, shape))
    return layout


def _places(layout: Layout, chosen: Chosen) -> list[Place]:
    return [(number, layout[number][at], 1) for number, each in enumerate(chosen) for at in each]


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
    parser.add_argument("--planned-ranks", type=int, default=512)
    parser.add_argument("--planned-layers", type=int, default=4, help="of Llama-70B, which has 80")
    return parser


if __name__ == "__main__":
    main()
