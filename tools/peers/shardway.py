"""The arm of Shardway: `shardway train`, with a count of the tokens in each step.

python -m peers.shardway JOB                    composes and launches, as the command does
torchrun … -m peers.shardway JOB RUN ATTEMPT    a rank
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from launcher import train, worker
from launcher.cluster import command
from peers import job
from peers.job import Job


def main() -> None:
    mine = job.read()
    if len(sys.argv) > 2:
        del sys.argv[1]
        _count(mine)
        worker.main()
    ours, path = command.torchrun_command, sys.argv[1]

    def torchrun(
        run_dir: Path, attempt: int, nproc_per_node: int, numa_mode: str | None = None
    ) -> list[str]:
        words = ours(run_dir, attempt, nproc_per_node, numa_mode)
        at = words.index("launcher.worker")
        return [*words[:at], "peers.shardway", path, *words[at + 1 :]]

    command.torchrun_command = torchrun
    sys.argv = ["train", *overrides(mine)]
    train.main()


def overrides(mine: Job) -> list[str]:
    """The Shardway overrides of the job."""
    rows = mine.micro_batch_size * mine.accumulation * mine.ranks
    return [
        f"model.name_or_path={mine.model}",
        "data=alpaca",
        f"data.path={mine.rows}",
        f"data.max_length={mine.max_length}",
        "data.shuffle=false",
        f"method.rank={job.RANK}",
        f"method.alpha={job.ALPHA}",
        "precision=bf16",
        f"optimizer.learning_rate={job.LEARNING_RATE}",
        "scheduler=constant",
        f"training.micro_batch_size={mine.micro_batch_size}",
        f"training.global_batch_size={rows}",
        "training.epochs=null",
        f"training.max_steps={mine.steps}",
        f"training.seed={job.SEED}",
        f"cluster.nproc_per_node={mine.ranks}",
        f"run_dir={mine.folder}/run",
        *(f"{key}={str(value).lower()}" for key, value in mine.settings.items()),
    ]


def _count(mine: Job) -> None:
    """Make the loader write one line per step."""
    from launcher.data.loader import Loader, StepBatch

    lines = mine.counts(int(os.environ["RANK"])).open("w", buffering=1)
    original = Loader.step_batch

    def step_batch(self: Loader, step: int) -> StepBatch:
        dealt = original(self, step)
        line = {"tokens": int(dealt.tokens), "trained_tokens": int(dealt.target_tokens)}
        lines.write(json.dumps({"step": step + 1, **line}) + "\n")
        return dealt

    Loader.step_batch = step_batch  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
