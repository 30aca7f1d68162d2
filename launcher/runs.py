"""`shardway runs`, `stop`, `resume` and `logs`: run folders as a person looks after them.

All is read from the folders, and from `squeue` where a run is a Slurm job; no accounting is asked,
and torch is not imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from launcher import overview, sweep, train
from launcher.checkpoint import layout
from launcher.cluster import slurm
from launcher.config import store
from launcher.config.cluster import SlurmConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir

SECONDS_BETWEEN_LOOKS = 5.0  # at the queue


def main() -> None:
    """`shardway runs [FOLDER]`: a table of the run folders in FOLDER."""
    parser = _parser("runs", "A table of the run folders in FOLDER, or of a sweep's.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER")
    folder = parser.parse_args().folder
    if not overview.runs_in(folder):
        _refuse(f"{folder} holds no run (a folder with a config.yaml)")
    print(overview.table(folder), end="")


def stop() -> None:
    """`shardway stop RUN`: a checkpoint at the next step boundary, then the end."""
    parser = _parser("stop", "End a run, or all of a sweep, with a checkpoint; what waits in the "
                     "queue leaves it.")  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN")
    for sentence in ask_to_stop(parser.parse_args().run.absolute()):
        print(sentence, flush=True)


def ask_to_stop(path: Path) -> Iterator[str]:
    """Ask the run, or all of the sweep, at `path` to end; what becomes of each of them.

    Raises UserError where nothing of it is running.
    """
    asked = sweep.elements(path) if sweep.is_sweep(path) else [_found(path)]
    jobs = {job: run for run in asked if (job := slurm.job_of(run))}
    queue = slurm.queue(list(jobs))
    alive = {jobs[job] for job in queue} | {r for r in asked if overview.is_here(r.newest())}
    for run in alive:  # one that begins at this moment reads it, too
        run.stop.write_text("shardway stop")
    waiting = [job for job, each in queue.items() if each.state == "PENDING"]
    for job in waiting:  # first: else one begins when another has ended
        slurm.cancel_waiting(job)
        yield f"job {job} leaves the queue"
    for run in alive - {jobs[job] for job in waiting}:
        yield f"{run.path} saves at its next step and ends: shardway logs {run.path} --follow"
    if not alive:
        said = "nothing of it" if len(asked) > 1 else f"it is {overview.state(asked[0], None)}"
        raise UserError(f"{path} is not running: {said}")


def resume() -> None:
    """`shardway resume RUN`: go on from its newest checkpoint, where it ran before."""
    run = _run("resume", "Go on from a run's newest checkpoint, here or in the queue.")
    if overview.is_here(run):
        _refuse(f"{run.path} is running; stop it first: shardway stop {run.path}")
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
    file = _log(run, 0 if words.attempt and words.rank is None else words.rank)
    for text in _follow(file, run) if words.follow else [file.read_text(errors="replace")]:
        print(text, end="", flush=True)


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
    over, looked = False, 0.0
    with file.open(errors="replace") as opened:
        while True:
            if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                over, looked = not _lives(run), time.monotonic()
            if text := opened.read():
                yield text
            elif over:
                return
            time.sleep(0.5)


def _lives(run: RunDir) -> bool:
    if overview.is_here(run.newest()):
        return True
    job = slurm.job_of(run)
    try:
        return bool(job and job in slurm.queue([job]))
    except UserError as error:
        print(error, file=sys.stderr)  # the controller is busy: look again later
        return True


def _run(verb: str, about: str) -> RunDir:
    parser = _parser(verb, about)
    parser.add_argument("run", type=Path, metavar="RUN")
    return _found(parser.parse_args().run)


def _found(path: Path) -> RunDir:
    run = RunDir(path.absolute())
    if not run.config.is_file():
        raise UserError(f"{path} is no run folder (it has no config.yaml)")
    return run.newest()


def _parser(verb: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"shardway {verb}", description=about)


def _refuse(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(train.UNUSABLE_CONFIGURATION)
