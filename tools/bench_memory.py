"""Peak training memory of a rank, by strategy and number of ranks, compared with the plan.

    python tools/bench_memory.py                       SmolLM2, method=full: CPU, or GPUs
    python tools/bench_memory.py --method lora --ranks 2 --strategies fsdp zero3

The peak covers building the model and two optimizer steps with one row per rank, on the rank that
needs most. On CPU it is the growth of the process's own memory, on GPUs the memory that CUDA
allocated. The percentage after it is the error of `shardway plan`. For offloading strategies on CPU
the plan is too high, because it adds the peaks of two memories where there is only one.
"""

from __future__ import annotations

import argparse

import bench_parts
from bench_parts import MB, config_of, train_state

from launcher.commands.fetch import MODELS, fetch
from launcher.config import Config
from launcher.config.schema.strategy import STRATEGIES
from launcher.distributed.process_group import RankInfo
from launcher.memory.dry_run import STEPS, longest_step_batch
from launcher.memory.planning import PlannedRun, plan_run
from launcher.training.loop import train_step


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    heads = " | ".join(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in arguments.ranks)
    told = (arguments.model, f"method={arguments.method}", f"precision={arguments.precision}")
    print(f"{', '.join(told)}, {arguments.length} tokens a rank")
    print(f"| peak MB a rank (plan) | {heads} |\n|{'---|' * (1 + len(arguments.ranks))}")
    for strategy in arguments.strategies:
        print(f"| `{strategy}` |", end="", flush=True)
        for ranks in arguments.ranks:
            config = config_of(
                *(folder, strategy, arguments.method, arguments.precision),
                data={"path": "none", "max_length": arguments.length},
                training={"global_batch_size": ranks, "micro_batch_size": 1},
                cluster={"name": "local", "nproc_per_node": ranks},
            )
            planned = plan_run(config)
            bench_parts.spawn(training, ranks, config, planned)
        print()


def training(rank_info: RankInfo, config: Config, planned: PlannedRun) -> None:
    """Print a table cell: the peak in MB and the relative error of the plan."""
    with bench_parts.memory(rank_info) as used:
        parts = train_state(rank_info, config)
        step_batch, training = longest_step_batch(config, rank_info.world_size), config.training
        targets = int(step_batch.target_tokens) * rank_info.world_size
        for _ in range(STEPS):
            train_step(
                parts.strategy, step_batch, targets, training.max_grad_norm, rank_info.device
            )
    seen = used.gpu or used.host
    expected = planned.peak + (0 if used.gpu else planned.host)  # on CPU both share one memory
    bench_parts.say(rank_info, f" {seen / MB:,.0f} ({expected / seen - 1:+.0%}) |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2_135m")
    parser.add_argument("--method", default="full")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), metavar="NAME")
    parser.set_defaults(strategies=["ddp", "fsdp", "zero1", "zero2", "zero3"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    return parser


if __name__ == "__main__":
    main()
