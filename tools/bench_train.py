"""Tokens per second of Shardway's loop against a plain PyTorch loop: same model, rows and batch.

    python tools/bench_train.py                     SmolLM2, LoRA, this machine's CPU or first GPU
    python tools/bench_train.py --model tiny --rounds 20

Both arms live in one process and take turns, step by step, so that a drift of the machine's speed
meets both. The ratio is taken pair by pair; quote its median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from launcher import paths
from launcher.config.data import DataConfig
from launcher.config.method import LoraConfig
from launcher.config.model import ModelConfig
from launcher.config.optimizer import AdamwConfig
from launcher.config.scheduler import CosineConfig
from launcher.config.strategy import SingleConfig
from launcher.config.training import TrainingConfig
from launcher.data.batch import IGNORED, MicroBatch
from launcher.data.dataset import load_data
from launcher.data.loader import Loader
from launcher.data.order import Shuffled
from launcher.data.packing import one_each
from launcher.distributed.process_group import Place, start
from launcher.loop import train_step
from launcher.method.fused import fuse_adapters
from launcher.method.lora import Lora
from launcher.model.fetch import MODELS, fetch
from launcher.model.head import chunk_loss
from launcher.model.load import build_model
from launcher.model.tokenizer import load_tokenizer
from launcher.optimizer import build_optimizer
from launcher.precision import PRECISIONS
from launcher.scheduler import build_scheduler
from launcher.strategy import build_strategy

Step = Callable[[int], float]  # step number → loss
SEED = 42
METHOD = LoraConfig(name="lora", rank=16)
OPTIMIZER = AdamwConfig(learning_rate=1e-4)
SCHEDULER = CosineConfig(name="cosine")


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    place = _alone()
    loader = _loader(folder, arguments.batch, arguments.micro_batch)
    arms = {
        "shardway": shardway_arm(folder, loader, place, arguments),
        "plain": plain_arm(folder, loader, place, arguments),
    }
    seconds, losses = interleave(arms, arguments.rounds, place.device)
    report(seconds, losses, loader, arguments, place)
    dist.destroy_process_group()


def shardway_arm(folder: Path, loader: Loader, place: Place, arguments: argparse.Namespace) -> Step:
    """The product's own parts, as the worker puts them together."""
    model, weights = build_model(
        ModelConfig(name_or_path=str(folder)), folder, SEED, PRECISIONS[arguments.precision].compute
    )
    model = Lora(METHOD).prepare(model, SEED)
    fuse_adapters(model)
    chunk_loss(model, "chunked")
    precision = PRECISIONS[arguments.precision]
    single, training = SingleConfig(name="single"), TrainingConfig()
    strategy = build_strategy(single, training, place, precision)
    strategy.setup(model, weights, lambda trained: build_optimizer(OPTIMIZER, trained))
    scheduler = build_scheduler(SCHEDULER, strategy.optimizer, 10_000)
    strategy.model.train()

    def step(number: int) -> float:
        window = loader.window(number)
        targets = int(strategy.sum(window.target_tokens))
        stats = train_step(strategy, window, targets, 1.0, place.device)
        scheduler.step()
        return stats.loss.item()

    return step


def plain_arm(folder: Path, loader: Loader, place: Place, arguments: argparse.Namespace) -> Step:
    """What one would write by hand: from_pretrained, PEFT, AdamW, backward, clip, step."""
    dtype = PRECISIONS[arguments.precision].compute
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place.device)
    model = Lora(METHOD).prepare(model, SEED).to(place.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIMIZER.learning_rate, weight_decay=0.0, fused=True)
    scheduler = build_scheduler(SCHEDULER, optimizer, 10_000)

    def step(number: int) -> float:
        window = loader.window(number)
        total = 0.0
        for batch in window.micro_batches:
            batch = batch.to(place.device)
            with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(input_ids=batch.input_ids, use_cache=False).logits
            loss = cross_entropy(
                logits.flatten(0, 1).float(),
                _labels(batch).flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            loss = loss / int(window.target_tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return total

    return step


def _labels(batch: MicroBatch) -> torch.Tensor:
    """The token to predict at each place [rows, length], or IGNORED."""
    real = batch.target_ids != IGNORED
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels.view(-1)[batch.target_at[real]] = batch.target_ids[real]
    return labels


def interleave(
    arms: dict[str, Step], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of each arm's steps; two warm-up rounds are not timed. Arms swap places
    every round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 2):
        order = list(arms) if number % 2 else list(reversed(arms))
        for name in order:
            _wait(device)
            began = time.perf_counter()
            losses[name].append(arms[name](number))
            _wait(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
        print(f"round {number + 1}/{rounds + 2}", end="\r", flush=True)
    return seconds, losses


def report(
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    loader: Loader,
    arguments: argparse.Namespace,
    place: Place,
) -> None:
    tokens = [int(loader.window(number + 2).tokens) for number in range(arguments.rounds)]
    rates = {
        name: [count / taken for count, taken in zip(tokens, times, strict=True)]
        for name, times in seconds.items()
    }
    ratios = [ours / plain for ours, plain in zip(rates["shardway"], rates["plain"], strict=True)]
    apart = max(
        abs(ours - plain) / plain
        for ours, plain in zip(losses["shardway"], losses["plain"], strict=True)
    )
    print(
        f"{arguments.model}, LoRA rank {METHOD.rank}, {arguments.precision}, "
        f"{arguments.batch} rows a step in micro-batches of {arguments.micro_batch}, "
        f"{place.device.type}, {torch.get_num_threads()} threads, {arguments.rounds} rounds"
    )
    for name, values in rates.items():
        print(f"  {name:<9} {_three(values, 1)} tokens/s")
    print(f"  ratio     {_three(ratios, 3)}  (shardway / plain, pair by pair)")
    print(f"  losses differ by at most {apart:.1e} (relative)")


def _three(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"median {middle:.{digits}f}  (min {low:.{digits}f}, max {high:.{digits}f})"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _alone() -> Place:
    """A process group of one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    cuda = torch.cuda.is_available()
    place = Place(0, 0, 1, 1, torch.device("cuda", 0) if cuda else torch.device("cpu"))
    start(place, dist.HashStore())
    return place


def _loader(folder: Path, batch: int, micro_batch: int) -> Loader:
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    config = DataConfig(path=str(paths.bundled("demo/train.jsonl")), max_length=128)
    rows = load_data(config, tokenizer).rows
    return Loader(
        rows,
        one_each(range(len(rows))),
        Shuffled(SEED, len(rows)),
        rank=0,
        world_size=1,
        micro_batch_size=micro_batch,
        global_batch_size=batch,
        pad_to_multiple_of=128,  # one shape: what is compared is the loop, not oneDNN's cache
        pad_token_id=tokenizer.pad_token_id,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows a forward")
    return parser


if __name__ == "__main__":
    main()
