"""Output of a rank: its log file, the shared console, and its last words. Imports no torch.

The console is rank 0's stdout as it was when the process began; stdout and stderr themselves go to
the rank's log, whatever library writes to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from launcher.errors import UserError
from launcher.manifest import write_json
from launcher.run_dir import RunDir

FAILED = 1
REFUSED = 2
STOPPED = 75  # sysexits.h EX_TEMPFAIL: a checkpoint stands, try again
# Signs of gloo and NCCL that another rank went away: then that rank is the one to look at.
LOST_PEER = (
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "timed out",
    "Socket Timeout",
    "ncclRemoteError",
    "remote process exited",
)


class Console(io.TextIOBase):
    """A terminal or pipe that may go away (`| head`, a closed window): training goes on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        # When the reader has gone what is said is lost; metrics.jsonl and the logs are not.
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode())
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def open_log(run: RunDir, rank: int) -> Console:
    """Send stdout and stderr to the rank's log; return the console, silent but for rank 0."""
    _end_with_the_agent()
    sys.stdout.flush()
    console = Console(os.dup(1) if rank == 0 else os.open(os.devnull, os.O_WRONLY))
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


def _end_with_the_agent() -> None:
    """Have the kernel end this rank when torchrun is killed: it could not end its ranks then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


@contextmanager
def last_words(run: RunDir, rank: int) -> Iterator[None]:
    """Leave the reason of a failure in the rank's log and in a file that the launcher reads."""
    try:
        yield
    except Exception as error:
        refused = isinstance(error, UserError)
        message = str(error) if refused else f"{type(error).__name__}: {error}"
        if refused:
            print(message, file=sys.stderr)
        else:
            traceback.print_exc()
        status = REFUSED if refused else FAILED
        report = {
            "rank": rank,
            "time": time.time(),
            "message": message,
            "exit_code": status,
            "lost_peer": any(sign in message for sign in LOST_PEER),
        }
        _end(run, report, status)


def _end(run: RunDir, report: dict[str, Any], status: int) -> NoReturn:
    try:
        write_json(run.rank_error(report["rank"]), report)
        sys.stderr.flush()
    finally:
        # Not sys.exit: the teardown of a process group whose peers are waiting can hang.
        os._exit(status)
