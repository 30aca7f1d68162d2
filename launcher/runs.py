"""`shardway runs`, `stop`, `resume` and `logs`: run folders as a person looks after them.

All is read from the folders, and from `squeue` where a run is a Slurm job; no accounting is asked,
and torch is not imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil

from launcher import train
from launcher.checkpoint import layout
from launcher.cluster import slurm
from launcher.config import store
from launcher.config.cluster import SlurmConfig
from launcher.run_dir import RunDir

COLUMNS = ("run", "state", "attempt", "step", "loss", "left", "job", "nodes")


def main() -> None:
    """`shardway runs [FOLDER]`: a table of the run folders in FOLDER."""
    parser = _parser("runs", "A table of the run folders in FOLDER, the newest last.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER")
    folder = parser.parse_args().folder
    found = [RunDir(path.parent) for path in folder.glob("*/config.yaml")]
    if not found:
        _refuse(f"{folder} holds no run (a folder with a config.yaml)")
    found.sort(key=lambda run: run.config.stat().st_mtime)
    queue = slurm.queue([job for run in found if (job := slurm.job_of(run))])
    rows = [COLUMNS, *(_row(run.newest(), queue) for run in found)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    for row in rows:
        print(
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        )


def stop() -> None:
    """`shardway stop RUN`: a checkpoint at the next step boundary, then the end."""
    run = _run("stop", "End a run with a checkpoint; one that waits in the queue leaves it.")
    job = slurm.job_of(run)
    queued = slurm.queue([job]).get(job) if job else None
    if job and queued and queued.state == "PENDING":
        slurm.cancel(job)
        print(f"job {job} has left the queue")
        return
    if not (queued or _is_here(run)):
        _refuse(f"{run.path} is not running: {_state(run, None)}")
    run.stop.write_text("shardway stop")
    print(f"{run.path} saves at its next step and ends; follow: shardway logs {run.path} --follow")


def resume() -> None:
    """`shardway resume RUN`: go on from its newest checkpoint, where it ran before."""
    run = _run("resume", "Go on from a run's newest checkpoint, here or in the queue.")
    job = slurm.job_of(run)
    if _is_here(run) or (job and job in slurm.queue([job])):
        _refuse(f"{run.path} is {_state(run, 'RUNNING')}; stop it first: shardway stop {run.path}")
    config = store.load(run.config)
    if not layout.finished(run.checkpoints):
        _refuse(f"{run.path} has no finished checkpoint; start it anew with another run_dir")
    training = dataclasses.replace(config.training, stop_after_steps=None)
    config = dataclasses.replace(config, resume="auto", run_dir=str(run.path), training=training)
    world = train.check(config)
    if isinstance(config.cluster, SlurmConfig):
        sys.exit(slurm.launch(config, config.cluster))
    sys.exit(train.launch(config, world))


def logs() -> None:
    """`shardway logs RUN [--rank N] [--attempt N] [--follow]`."""
    parser = _parser("logs", "What a run said: its console in the queue, or the log of a rank.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--rank", type=int, help="the log of this rank")
    parser.add_argument("--attempt", type=int, help="of this attempt; without it, of the newest")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    words = parser.parse_args()
    run = _found(words.run)
    if words.attempt:
        run = RunDir(run.path, words.attempt)
    file = _log(run, words.rank)
    for text in _follow(file, run) if words.follow else [file.read_text(errors="replace")]:
        print(text, end="", flush=True)


def _row(run: RunDir, queue: dict[str, slurm.Queued]) -> tuple[str, ...]:
    job = slurm.job_of(run) or ""
    queued = queue.get(job)
    steps = [line for line in _metrics(run) if "loss" in line]
    newest = steps[-1] if steps else None
    total = store.load(run.config).training.max_steps
    step = f"{newest['step'] if newest else 0}{f'/{total}' if total else ''}"
    return (
        run.path.name,
        _state(run, queued.state if queued else None),
        str(run.attempt),
        step,
        f"{newest['loss']:.4f}" if newest else "",
        _left(steps, total) if queued or _is_here(run) else "",
        job,
        queued.nodes if queued else "",
    )


def _state(run: RunDir, queued: str | None) -> str:
    """Slurm's word while there is a job; else how the newest attempt ended."""
    if queued:
        return queued.lower()
    if run.status.is_file():
        return str(json.loads(run.status.read_text())["state"])
    return "running" if _is_here(run) else "failed" if run.attempt else "not started"


def _is_here(run: RunDir) -> bool:
    """Whether ranks of the newest attempt are on this machine."""
    words = ["launcher.worker", str(run.path), str(run.attempt)]
    for process in psutil.process_iter(["cmdline"]):
        if words == (process.info["cmdline"] or [])[-3:]:
            return True
    return False


def _left(steps: list[dict[str, Any]], total: int | None) -> str:
    """Of the last hundred steps' pace."""
    recent = steps[-100:]
    if total is None or len(recent) < 2:
        return ""
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    seconds = int(pace * (total - recent[-1]["step"]))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _metrics(run: RunDir) -> list[dict[str, Any]]:
    if not run.metrics.is_file():
        return []
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half there


def _log(run: RunDir, rank: int | None) -> Path:
    if rank is not None:
        file = run.rank_log(rank)
        if not file.is_file():
            _refuse(f"{file} is not there; there are ranks {_ranks(run)}")
        return file
    consoles = sorted(run.logs.parent.glob("slurm-*.out"), key=lambda file: file.stat().st_mtime)
    if consoles:
        return consoles[-1]
    if not run.rank_log(0).is_file():
        _refuse(f"{run.path} has said nothing yet")
    return run.rank_log(0)


def _ranks(run: RunDir) -> str:
    names = sorted(file.stem.removeprefix("rank-") for file in run.logs.glob("rank-*.log"))
    return ", ".join(str(int(name)) for name in names) or "none yet"


def _follow(file: Path, run: RunDir) -> Iterator[str]:
    """What is written, until the run has ended."""
    with file.open(errors="replace") as opened:
        while True:
            over = not _lives(run)
            if text := opened.read():
                yield text
            elif over:
                return
            time.sleep(0.5)


def _lives(run: RunDir) -> bool:
    job = slurm.job_of(run)
    return _is_here(run.newest()) or bool(job and job in slurm.queue([job]))


def _run(verb: str, about: str) -> RunDir:
    parser = _parser(verb, about)
    parser.add_argument("run", type=Path, metavar="RUN")
    return _found(parser.parse_args().run)


def _found(path: Path) -> RunDir:
    run = RunDir(path.absolute())
    if not run.config.is_file():
        _refuse(f"{path} is no run folder (it has no config.yaml)")
    return run.newest()


def _parser(verb: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"shardway {verb}", description=about)


def _refuse(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(train.UNUSABLE_CONFIGURATION)
