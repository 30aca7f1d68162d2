"""The output of a rank: its log file, the shared console and its failure report. Imports no torch.

The console is rank 0's stdout as it was when the process started. stdout and stderr themselves go
to the rank's log, including what C libraries write to them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from launcher.errors import BAD_NODE, FAILED, SpikeError, StepError, UserError, rows_of, step_of
from launcher.folders.manifest import write_json
from launcher.folders.run import RunDir

# Parts of gloo's and NCCL's error messages after another rank has gone: the cause is on that rank.
LOST_PEER_MESSAGES = (
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "timed out",
    "Socket Timeout",
    "ncclRemoteError",
    "remote process exited",
)


class Terminal(io.TextIOBase):
    """A terminal or pipe. Training continues if it goes away (`| head`, a closed window)."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        # Without a reader this text is lost; metrics.jsonl and the logs are still written.
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode())
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


class ConsoleFile(io.TextIOBase):
    """The file of a console; None: nowhere. Training continues on a full disk."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, text: str) -> int:
        # Opened each time, so that a file that was deleted is created again.
        if self._path is not None:
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        return len(text)


class Console(io.TextIOBase):
    """What a person watches: a terminal, and a file with the same text."""

    def __init__(self, terminal: Terminal, file: ConsoleFile) -> None:
        self.terminal, self.file = terminal, file

    def write(self, text: str) -> int:
        self.terminal.write(text)
        return self.file.write(text)

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def fileno(self) -> int:
        return self.terminal.fileno()


def say(run: RunDir, text: str) -> None:
    """Print `text` on the terminal and in the file of the console, where no rank runs."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # its reader has gone: a run does not end with its console
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    console_file(run).write(f"{text}\n")


def console_file(run: RunDir) -> ConsoleFile:
    """The file of the attempt's console. Slurm writes that of a job itself."""
    return ConsoleFile(None if run.job.is_file() else run.console)


def open_log(run: RunDir, rank: int) -> Console:
    """Send stdout and stderr to the rank's log. Returns the console, silent except on rank 0."""
    sys.stdout.flush()
    if rank == 0:
        console = Console(Terminal(os.dup(1)), console_file(run))
    else:
        console = Console(Terminal(os.open(os.devnull, os.O_WRONLY)), ConsoleFile(None))
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


@contextmanager
def report_failure(run: RunDir, rank: int) -> Iterator[None]:
    """On an exception, write its cause to the rank's log and to a file that the launcher reads, and
    end the process."""
    try:
        yield
    except Exception as error:
        refused = isinstance(error, UserError)
        message = str(error) if refused else f"{type(error).__name__}: {error}"
        if refused:
            print(message, file=sys.stderr)
        else:
            traceback.print_exc()
        exit_code = error.status if isinstance(error, UserError) else FAILED
        lost_peer = any(part in message for part in LOST_PEER_MESSAGES) and exit_code != BAD_NODE
        try:
            place = {"kind": _kind(error), "step": step_of(error), "rows": rows_of(error)}
            _write_report(run, rank, message, exit_code, lost_peer, place)
            sys.stderr.flush()
        finally:
            # Not sys.exit: destroying a process group can hang while its other ranks wait.
            os._exit(exit_code)


def end_process() -> NoReturn:
    """End a rank that has done its work, with status 0.

    Not sys.exit: threads of gloo live as long as the caches of DTensor, which know the process
    group. One that drops its tensor while the interpreter is being finalized gets no GIL, and the
    process aborts ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def report_lost_rank(run: RunDir, rank: int) -> None:
    """Write that this rank ends because another one has failed, if it can be written."""
    with contextlib.suppress(OSError):
        if not run.rank_error(rank).exists():
            _write_report(run, rank, "ended: another rank has failed", FAILED, lost_peer=True)


def _kind(error: Exception) -> str:
    """What a launcher that may restart the run has to know about an error."""
    if isinstance(error, StepError):
        return "spike" if isinstance(error, SpikeError) else "step"
    if isinstance(error, UserError):
        return "refused"
    is_memory = isinstance(error, MemoryError) or "out of memory" in str(error)
    return "memory" if is_memory else "error"


def _write_report(
    run: RunDir,
    rank: int,
    message: str,
    exit_code: int,
    lost_peer: bool,
    place: Mapping[str, object] = MappingProxyType({}),
) -> None:
    report = {
        "rank": rank,
        "time": time.time(),
        "message": message,
        "exit_code": exit_code,
        "lost_peer": lost_peer,
        **place,
    }
    write_json(run.rank_error(rank), report)
