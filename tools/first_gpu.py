"""A part of tools/first_gpu.sh: prints one line of JSON with what it found.

    python tools/first_gpu.py smoke zero3 --scratch FOLDER                   on this machine's GPUs
    CUDA_VISIBLE_DEVICES= python tools/first_gpu.py resume --scratch FOLDER --shape tiny     on CPU

The exit status is 1 if a command fails or a finding is not as it must be; the reason is on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_gpu
import random_model

import launcher
from launcher.cluster.gpus import visible_gpus

Found = dict[str, Any]
CHECKOUT = Path(launcher.__file__).resolve().parent.parent
TOOLS = Path(__file__).parent


class Failed(Exception):
    """A command failed, or a finding is not as it must be."""


@dataclass(frozen=True)
class Place:
    """Where a part runs: the folder with models and texts, the shape of the large model, and the
    ranks of a run that shards: one for each GPU, or one on a CPU."""

    scratch: Path
    shape: str

    @property
    def ranks(self) -> int:
        return visible_gpus() or 1

    @property
    def is_small(self) -> bool:
        return self.shape == "tiny"

    def model(self, shape: str) -> Path:
        """The random model of a shape, made once."""
        folder, partial = self.scratch / shape, self.scratch / f".{shape}.partial"
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)  # of a part that ran out of time
            random_model.make(shape, partial)
            partial.rename(folder)
        return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("name", nargs="?", help="strategy of a smoke, row of a bench, shape")
    parser.add_argument("--scratch", type=Path, required=True, help="models and texts stay there")
    parser.add_argument("--shape", choices=["8b", "1b", "tiny"], default="8b")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    place = Place(options.scratch.resolve(), options.shape)
    try:
        found = PARTS[options.part](place, *[options.name] * (options.name is not None))
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(json.dumps(found))


def machine(place: Place) -> Found:
    """Versions, and the GPUs."""
    import torch

    gpus = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [{"name": each.name, "bytes": each.total_memory} for each in gpus],
        "cpus": os.cpu_count(),
    }


def model(place: Place, shape: str) -> Found:
    """Make a random model."""
    files = place.model(shape).glob("*.safetensors")
    return {"shape": shape, "bytes": sum(file.stat().st_size for file in files)}


def smoke(place: Place, strategy: str) -> Found:
    """Six steps of full fine-tuning of a tiny model."""
    return falling(train(place, "tiny", f"strategy={strategy}", "method=full"))


def experts(place: Place, strategy: str) -> Found:
    """The same for a model with experts and buffers."""
    return falling(train(place, "tiny_moe", f"strategy={strategy}", "method=full"))


def resume(place: Place) -> Found:
    """Whether a deterministic run that stops and resumes has the losses of one that does not."""
    words = ("method=full", "strategy=fsdp", "training.deterministic=true")
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        expected = train(place, "tiny", *words, run=whole)
        train(place, "tiny", *words, "training.stop_after_steps=3", run=parts)
        losses = [each["loss"] for each in train(place, "tiny", *words, "resume=auto", run=parts)]
    apart = [
        abs(each["loss"] - loss) / each["loss"] for each, loss in zip(expected, losses, strict=True)
    ]
    if max(apart):
        raise Failed(f"losses differ by up to {max(apart):.1e} (relative): {apart}")
    return {"equal": True, "steps": len(losses)}


def bench(place: Place, row: str) -> Found:
    """A row of tools/bench_gpu.py."""
    return bench_row(place, row, "--no-plan")


def plan(place: Place) -> Found:
    """The peak of `shardway plan` against the one that the rank measures."""
    found = bench_row(place, "lora")
    if found["plan"] is None:
        raise Failed(f"the plan failed: {found['plan_error']}")
    error = found["plan"] / found["measured"] - 1
    return {"plan": found["plan"], "measured": found["measured"], "error": round(error, 4)}


def bench_row(place: Place, row: str, *words: str) -> Found:
    """What tools/bench_gpu.py finds with its options `words`."""
    steps = ("--steps", "6", "--warm-up", "2") if place.is_small else ("--steps", "14")
    command = [str(TOOLS / "bench_gpu.py"), "--json", "--rows", row, "--shape", place.shape]
    command += ["--model", str(place.model(place.shape)), "--scratch", str(place.scratch)]
    found: Found = json.loads(last_line([*command, *steps, *words]))
    if found["failed"]:
        raise Failed(found["failed"])
    return found


def profile(place: Place) -> Found:
    """Three steps of LoRA on the large model."""
    length, rows = bench_gpu.LENGTHS[place.shape], 2
    bench_gpu.texts(place.scratch, 16 * rows, length)
    found: Found = json.loads(
        last_line(
            [
                *(str(TOOLS / "profile_steps.py"), "--json", "--warm-up", "4"),
                *(f"model.name_or_path={place.model(place.shape)}", "data=pretrain"),
                *(f"data.path={place.scratch / 'full.txt'}", f"data.max_length={length}"),
                *("method=lora", "strategy=single", "precision=bf16", "scheduler=constant"),
                *(f"training.global_batch_size={rows}", "training.micro_batch_size=1"),
                *("training.epochs=null", "training.max_steps=16"),
            ]
        )
    )
    return found


def save(place: Place) -> Found:
    """For how long a save in the foreground and one in the background stop the training."""
    shape = "tiny" if place.is_small else "1b"
    words = (
        *("method=full", "strategy=fsdp", "precision=pure_bf16", "optimizer.learning_rate=1e-5"),
        *("checkpoint.save_steps=4", "checkpoint.keep_last=1", "training.max_steps=7"),
    )
    found: Found = {}
    for name, later in (("foreground", "false"), ("background", "true")):
        with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
            run = Path(folder) / "run"
            steps = train(place, shape, *words, f"checkpoint.async_save={later}", run=run)
            (checkpoint,) = (run / "checkpoints").glob("step-*")
            files = [file for file in checkpoint.rglob("*") if file.is_file()]
            found["bytes"] = sum(file.stat().st_size for file in files)
        times = [each["time"] for each in steps]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        usual = statistics.median(gaps)
        found[f"{name}_seconds"] = round(max(0.0, gaps[3] - usual), 3)  # from step 4 to step 5
        found[f"{name}_step_seconds"] = round(usual, 3)
    return found


def train(place: Place, shape: str, *words: str, run: Path | None = None) -> list[Found]:
    """The records of the steps of a `shardway train`; later words replace earlier ones."""
    settings = {
        "model.name_or_path": str(place.model(shape)),
        "precision": "bf16",
        "optimizer.learning_rate": "1e-3",
        "training.epochs": "null",
        "training.max_steps": "6",
        "training.global_batch_size": str(4 * place.ranks),
        "cluster.nproc_per_node": str(place.ranks),
        "tracking.plot": "false",
        **dict(word.split("=", 1) for word in words),
    }
    if settings["strategy"] == "single":
        settings["cluster.nproc_per_node"] = "1"
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
        run = run or Path(folder) / "run"
        overrides = [f"{key}={value}" for key, value in settings.items()]
        last_line(["-m", "launcher.cli", "train", f"run_dir={run}", *overrides])
        records = bench_gpu.records(run / "metrics.jsonl")
    return [each for each in records if "loss" in each]


def falling(steps: list[Found]) -> Found:
    """What a run has found. Raises Failed if its loss does not fall."""
    losses = [each["loss"] for each in steps]
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise Failed(f"the loss does not fall: {losses}")
    last = {key: steps[-1][key] for key in ("peak_memory_bytes", "step_seconds_p50")}
    return {"losses": losses, **last}


def last_line(words: list[str]) -> str:
    """The last line that a Python command prints. Raises Failed with its output if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return (done.stdout.strip().splitlines() or [""])[-1]


PARTS: dict[str, Callable[..., Found]] = {
    part.__name__: part
    for part in (machine, model, smoke, experts, resume, bench, plan, profile, save)
}


if __name__ == "__main__":
    main()
