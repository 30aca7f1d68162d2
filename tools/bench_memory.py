"""Peak memory of a rank while it trains, by strategy and number of ranks.

    python tools/bench_memory.py                       SmolLM2, method=full: CPU, or GPUs
    python tools/bench_memory.py --method lora --ranks 2 --strategies fsdp zero3

The peak is that of building the model and of two optimizer steps, one row a rank, on the rank that
needed most. On CPU it is the growth of the process's own memory, on GPUs what CUDA allocated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bench_parts
import torch
from bench_parts import MB, learner

from launcher.config.strategy import STRATEGIES
from launcher.data.batch import MicroBatch
from launcher.distributed.process_group import Place
from launcher.loss import token_loss
from launcher.model.fetch import MODELS, fetch

STEPS = 2


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    heads = " | ".join(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in arguments.ranks)
    print(f"{arguments.model}, method={arguments.method}, fp32, {arguments.length} tokens a rank")
    print(f"| peak MB a rank | {heads} |\n|{'---|' * (1 + len(arguments.ranks))}")
    for strategy in arguments.strategies:
        print(f"| `{strategy}` |", end="", flush=True)
        for ranks in arguments.ranks:
            words = (folder, strategy, arguments.method, arguments.length)
            bench_parts.spawn(training, ranks, *words)
        print()


def training(place: Place, folder: Path, strategy: str, method: str, length: int) -> None:
    """Say the peak in MB: a cell of the table."""
    with bench_parts.memory(place) as used:
        parts = learner(place, folder, strategy, method, rows=place.world_size)
        tokens = torch.randint(100, (1, length), device=place.device)  # below any vocabulary's end
        batch = MicroBatch(tokens, torch.arange(length, device=place.device), tokens[0])
        for _ in range(STEPS):
            parts.strategy.accumulate(last=True)
            loss = token_loss(parts.strategy.model, batch)
            parts.strategy.backward(loss / (length * place.world_size))
            parts.strategy.step(1.0)
    bench_parts.say(place, f" {(used.gpu or used.host) / MB:,.0f} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2_135m")
    parser.add_argument("--method", default="full")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), metavar="NAME")
    parser.set_defaults(strategies=["ddp", "fsdp", "zero1", "zero2", "zero3"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    return parser


if __name__ == "__main__":
    main()
