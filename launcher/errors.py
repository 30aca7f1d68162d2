"""The exception whose message is written for the user, and the exit statuses of a process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

FAILED = 1
REFUSED = 2  # the request or the configuration cannot be met; the message gives the reason
MAX_LINE = 4_000  # characters of a message that are shown
BAD_NODE = 69  # sysexits.h EX_UNAVAILABLE: a machine is at fault, and another one may do
STOPPED = 75  # sysexits.h EX_TEMPFAIL: a checkpoint is saved, the run can be resumed


class UserError(ValueError):
    """An error that the user can fix. The message names the key or file, the value and the fix.

    It is shown without a traceback, and the process exits with its `status`.
    """

    status = REFUSED


class BadNode(UserError):
    """The same request may run on other machines than those that the message names."""

    status = BAD_NODE


@contextmanager
def exit_when_refused() -> Iterator[None]:
    """Print a UserError and exit with its status: for programs that other programs start."""
    try:
        yield
    except UserError as error:
        print(shortened(error), file=sys.stderr)
        sys.exit(error.status)


def shortened(error: UserError) -> str:
    """The message, without the middle of a line that a name of a million letters is in."""
    half = MAX_LINE // 2
    lines = str(error).split("\n")
    return "\n".join(
        line if len(line) <= MAX_LINE else f"{line[:half]} … {line[-half:]}" for line in lines
    )


def one_line(error: BaseException, length: int = 400) -> str:
    """The first `length` characters of what a library's exception says, without line breaks; its
    type if it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def first_sentence(error: Exception) -> str:
    """What a library's exception says, on one line, up to the end of its first sentence."""
    return one_line(error, MAX_LINE).partition(". ")[0].rstrip(".:")
