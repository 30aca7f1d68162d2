"""Runs one arm in its own processes and reads the steps that it reports."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_process import Family, peak_rss, watch

import launcher
from launcher.io.cpus import usable_cpus
from peers.arms import Arm
from peers.job import Job

TOOLS = Path(__file__).resolve().parent.parent
CHECKOUT = Path(launcher.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A step on all ranks: tokens are summed; loss and time come from rank 0."""

    step: int  # counted from 1
    loss: float  # mean over the trained tokens
    tokens: int  # without padding
    trained_tokens: int
    time: float  # end of the step, in seconds as from time.time()


@dataclass
class Run:
    """The measurements of one arm in one round."""

    arm: str
    ranks: int
    round: int
    steps: list[Step] = field(default_factory=list)
    began: float = 0.0  # start of its first process, on the clock of Step.time
    peak_rss: int = 0  # bytes, on the rank that needed most
    failed: str | None = None  # the path of its log

    @property
    def first_step_seconds(self) -> float:
        """Seconds from the start of the process to the end of its first step."""
        return self.steps[0].time - self.began


def run(arm: Arm, job: Job, python: Path, number: int, seconds: float) -> Run:
    """Train for `job.steps` steps or `seconds` from the start, whichever ends first."""
    seen = Run(arm.name, job.ranks, number, began=time.time())

    def enough(family: Family) -> bool:
        seen.peak_rss = max(seen.peak_rss, peak_rss(family))
        seen.steps = steps(job)
        return len(seen.steps) == job.steps

    folder = Path(job.folder)
    status = watch(command(arm, job, python), environment(arm, job), folder, enough, seconds)
    seen.steps = steps(job)
    if status is not None and len(seen.steps) < job.steps:
        seen.failed = str(folder / "log.txt")
    return seen


def command(arm: Arm, job: Job, python: Path) -> list[str]:
    """The command: Shardway starts its ranks itself; torchrun starts a peer with several ranks."""
    torchrun: list[str] = []
    if job.ranks > 1 and not arm.is_ours:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}", "-m"]
    return [str(python), "-m", *torchrun, f"peers.{arm.system}", str(job.write())]


def environment(arm: Arm, job: Job) -> dict[str, str]:
    """Caches are new for every run, so that each run tokenizes; ranks share the cores."""
    path = [str(TOOLS), *([str(CHECKOUT)] if arm.is_ours else [])]
    threads = max(1, usable_cpus() // job.ranks)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(threads),
        "HF_HOME": f"{job.folder}/hf",
        "HF_HUB_OFFLINE": "1",
        "SHARDWAY_CACHE": f"{job.folder}/cache",
        "CUDA_VISIBLE_DEVICES": "",
    }


def steps(job: Job) -> list[Step]:
    """The steps that every rank has finished."""
    ranks = [_lines(job.counts(rank)) for rank in range(job.ranks)]
    shardways = _lines(Path(job.folder) / "run" / "metrics.jsonl")
    return [
        Step(
            step=first["step"],
            loss=first["loss"],
            tokens=sum(line["tokens"] for line in lines),
            trained_tokens=sum(line["trained_tokens"] for line in lines),
            time=first["time"],
        )
        for first, *lines in zip(shardways or ranks[0], *ranks, strict=False)
        if "loss" in first
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    whole = path.read_text().split("\n")[:-1]  # the last line may be incomplete
    return [json.loads(line) for line in whole]
