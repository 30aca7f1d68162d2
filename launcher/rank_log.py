"""Output of a rank: its log file, the shared console, and its last words. Imports no torch.

The console is rank 0's stdout as it was when the process began; stdout and stderr themselves go to
the rank's log, whatever library writes to them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from launcher.errors import UserError
from launcher.manifest import write_json
from launcher.run_dir import RunDir

FAILED = 1
REFUSED = 2
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


def open_log(run: RunDir, rank: int) -> IO[str]:
    """Send stdout and stderr to the rank's log; return the console, silent but for rank 0."""
    # The agent passes Ctrl-C on. A rank may be waiting in a collective, where Python's own handler
    # would not run: end at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    console = os.fdopen(os.dup(1) if rank == 0 else os.open(os.devnull, os.O_WRONLY), "w")
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


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
        write_json(
            run.rank_error(rank),
            {
                "rank": rank,
                "time": time.time(),
                "message": message,
                "exit_code": REFUSED if refused else FAILED,
                "lost_peer": any(sign in message for sign in LOST_PEER),
            },
        )
        sys.stderr.flush()
        # Not sys.exit: the teardown of a process group whose peers are waiting can hang.
        os._exit(REFUSED if refused else FAILED)
