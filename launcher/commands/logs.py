"""`shardway logs RUN`: the console of a run, or the log of one of its ranks."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from launcher.cluster.liveness import is_alive
from launcher.commands.arguments import command_parser, number
from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.run import RunDir
from launcher.run.processes import may_start_again
from launcher.run.status import find_run, job_in

RANK_LOG = re.compile(r"rank-(\d+)\.log", re.ASCII)
POLL_SECONDS = 5.0  # between two checks whether the run is alive
READ_SECONDS = 0.5  # between two looks at its log


def main() -> None:
    parser = command_parser("logs", "Print the console of a run, or the log of a rank.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--rank", type=number(int, 0), help="print the log of this rank")
    parser.add_argument(
        "--attempt", type=number(int, 1), help="of this attempt instead of the newest one"
    )
    parser.add_argument("--follow", action="store_true", help="print new lines until the run ends")
    arguments = parser.parse_args()
    run = find_run(arguments.run)
    if arguments.attempt:
        run = _attempt(run, arguments.attempt)
    newest = not arguments.attempt

    def find(run: RunDir) -> Path:
        return _console(run, newest) if arguments.rank is None else _rank_log(run, arguments.rank)

    if arguments.follow:
        texts = follow(run, find, newest)
    else:
        with _open(find(run)) as log:
            texts = iter([log.read()])
    is_empty = True
    for text in texts:
        print(text, end="", flush=True)
        is_empty = is_empty and not text
    if is_empty:
        print(f"{find(run.newest_attempt() if newest else run)} is empty", file=sys.stderr)


def _open(log: Path) -> TextIO:
    return io.TextIOWrapper(regular.open_file(log), errors="replace")


def _attempt(run: RunDir, number: int) -> RunDir:
    if number not in (attempts := run.attempts()):
        there_are = ", ".join(map(str, attempts)) or "none yet"
        raise UserError(f"{run.path} has no attempt {number}; its attempts: {there_are}")
    return RunDir(run.path, number)


def _rank_log(run: RunDir, rank: int) -> Path:
    file = run.rank_log(rank)
    if not file.is_file():
        raise UserError(f"{file} does not exist; there are logs of ranks {_ranks_with_logs(run)}")
    return file


def _console(run: RunDir, newest: bool) -> Path:
    """What the attempt printed, on this machine or as a job; the log of rank 0 for a run of a
    version that kept no console. `newest`: also what a job printed that has not begun an attempt.
    """
    if newest:
        names = [file.name for file in run.inside("logs").glob("slurm-*.out")]
        consoles = [run.inside("logs", name) for name in names]
    else:
        consoles = [run.job_console(job_in(run.job))] if run.job.is_file() else []
    if found := [file for file in (run.console, *consoles) if file.is_file()]:
        return max(found, key=lambda file: file.stat().st_mtime)
    if not run.rank_log(0).is_file():
        raise UserError(f"{run.path} has printed nothing yet")
    return run.rank_log(0)


def _ranks_with_logs(run: RunDir) -> str:
    names = [RANK_LOG.fullmatch(file.name) for file in run.logs.glob("rank-*.log")]
    return ", ".join(map(str, sorted(int(name[1]) for name in names if name))) or "none yet"


def follow(run: RunDir, find: Callable[[RunDir], Path], newest: bool) -> Iterator[str]:
    """The text that is added to the log which `find` finds, until the run has ended. `newest`: the
    logs of later attempts follow it.

    Raises UserError if the run ends without a log, or if its folder is removed.
    """
    file: Path | None = None
    ended, last_check = False, float("-inf")
    with ExitStack() as opened:
        log: TextIO = opened.enter_context(io.StringIO())
        while True:
            if text := log.read():
                yield text
            elif ended:
                return
            elif time.monotonic() - last_check < POLL_SECONDS:
                time.sleep(READ_SECONDS)
            else:
                ended, last_check = not _is_alive(run), time.monotonic()
                attempt = run.newest_attempt() if newest else run
                found = _find_or_wait(attempt, find, wait=file is not None or not ended)
                if found is not None and found != file:
                    if text := log.read():
                        yield text
                    run, file = attempt, found
                    log = opened.enter_context(_open(found))


def _find_or_wait(run: RunDir, find: Callable[[RunDir], Path], wait: bool) -> Path | None:
    """The log of an attempt; None if it has printed nothing yet. Raises UserError then, unless it
    may come: `wait`."""
    try:
        return find(run)
    except UserError:
        if not wait:
            raise
        return None


def _is_alive(run: RunDir) -> bool:
    if not run.path.is_dir():
        raise UserError(f"{run.path} has been removed")
    try:
        return is_alive(run.path) or may_start_again(run.newest_attempt())
    except UserError as error:
        print(error, file=sys.stderr)  # Slurm's controller is busy: ask again later
        return True
