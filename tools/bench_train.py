"""Tokens per second of Shardway and of a plain PyTorch loop: same model, rows and batch.

    python tools/bench_train.py                     SmolLM2, LoRA, this machine's CPU or first GPU
    python tools/bench_train.py --model tiny --rounds 20

Both arms run in one process and alternate step by step, so that a drift of the machine's speed
affects both. The ratio is computed for each pair of steps; quote its median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from bench_parts import config_of, train_state
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from launcher.commands.fetch import MODELS, fetch
from launcher.config import Config
from launcher.config.schema.method import LoraConfig
from launcher.data.build import build_loaders
from launcher.data.collate import IGNORED, MicroBatch
from launcher.data.loader import Loader
from launcher.distributed.process_group import RankInfo, init_process_group
from launcher.folders import paths
from launcher.method import build_method
from launcher.model.tokenizer import load_tokenizer
from launcher.strategy.precision import PRECISIONS, precision_of
from launcher.training.loop import train_step
from launcher.training.scheduler import build_scheduler

Step = Callable[[int], float]  # step number → loss
RANK = 16  # of LoRA
STEPS = 100  # of the schedule


def main() -> None:
    arguments = _parser().parse_args()
    folder = fetch(arguments.model)
    rank_info = _alone()
    config = _config(folder, arguments)
    loader = _loader(config)
    arms = {
        "shardway": shardway_arm(config, loader, rank_info),
        "plain": plain_arm(config, loader, rank_info),
    }
    seconds, losses = interleave(arms, arguments.rounds, rank_info.device)
    report(seconds, losses, loader, arguments, rank_info)
    dist.destroy_process_group()


def shardway_arm(config: Config, loader: Loader, rank_info: RankInfo) -> Step:
    """The training step of Shardway, built from the same parts as in the worker."""
    state = train_state(rank_info, config)
    strategy, max_grad_norm = state.strategy, config.training.max_grad_norm
    strategy.model.train()

    def step(number: int) -> float:
        step_batch = loader.step_batch(number)
        targets = int(strategy.sum(step_batch.target_tokens))
        stats = train_step(strategy, step_batch, targets, max_grad_norm, rank_info.device)
        state.scheduler.step()
        return stats.loss.item()

    return step


def plain_arm(config: Config, loader: Loader, rank_info: RankInfo) -> Step:
    """A hand-written training step: from_pretrained, PEFT, AdamW, backward, clip, step."""
    dtype = precision_of(config.precision).compute
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=dtype)
    method = build_method(config.method)
    model = method.prepare(model.to(rank_info.device), config.training.seed)
    model = model.to(rank_info.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=True)
    scheduler = build_scheduler(config.scheduler, optimizer, STEPS)

    def step(number: int) -> float:
        step_batch = loader.step_batch(number)
        total = 0.0
        for batch in step_batch.micro_batches:
            batch = batch.to(rank_info.device)
            with torch.autocast(rank_info.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(input_ids=batch.input_ids, use_cache=False).logits
            loss = cross_entropy(
                logits.flatten(0, 1).float(),
                _labels(batch).flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            loss = loss / int(step_batch.target_tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return total

    return step


def _labels(batch: MicroBatch) -> torch.Tensor:
    """The token to predict at each position [rows, length], or IGNORED."""
    real = batch.target_ids != IGNORED
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels.view(-1)[batch.target_positions[real]] = batch.target_ids[real]
    return labels


def interleave(
    arms: dict[str, Step], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of the steps of each arm. Two warm-up rounds are not timed. The arms swap
    their order every round."""
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
    rank_info: RankInfo,
) -> None:
    tokens = [int(loader.step_batch(number + 2).tokens) for number in range(arguments.rounds)]
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
        f"{arguments.model}, LoRA rank {RANK}, {arguments.precision}, "
        f"{arguments.batch} rows a step in micro-batches of {arguments.micro_batch}, "
        f"{rank_info.device.type}, {torch.get_num_threads()} threads, {arguments.rounds} rounds"
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


def _alone() -> RankInfo:
    """Create a process group with one rank."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    cuda = torch.cuda.is_available()
    rank_info = RankInfo(0, 0, 1, 1, torch.device("cuda", 0) if cuda else torch.device("cpu"))
    init_process_group(rank_info, dist.HashStore(), minutes=10)
    return rank_info


def _config(folder: Path, arguments: argparse.Namespace) -> Config:
    config = config_of(
        *(folder, "single", "lora", arguments.precision),
        data={
            "path": str(paths.bundled("demo/train.jsonl")),
            "max_length": 128,
            "pad_to_multiple_of": 128,  # one shape, so that the oneDNN cache does not matter
        },
        training={
            "global_batch_size": arguments.batch,
            "micro_batch_size": arguments.micro_batch,
            "max_steps": STEPS,
        },
    )
    assert isinstance(config.method, LoraConfig)
    return replace(config, method=replace(config.method, rank=RANK))


def _loader(config: Config) -> Loader:
    tokenizer = load_tokenizer(Path(config.model.name_or_path), trust_remote_code=False)
    return build_loaders(
        *(config.data, config.training, tokenizer, 0, 1),
        say=lambda line: None,
        check=lambda: None,
    ).training


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
