"""The exception whose message is written for the user, and the exit statuses of a process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FAILED = 1
REFUSED = 2  # the request or the configuration cannot be met; the message gives the reason
MAX_LINE = 4_000  # characters of a message that are shown
BAD_NODE = 69  # sysexits.h EX_UNAVAILABLE: a machine is at fault, and another one may do
STOPPED = 75  # sysexits.h EX_TEMPFAIL: a checkpoint is saved, the run can be resumed
HUNG = 76  # sysexits.h EX_PROTOCOL: a rank stood still, and the others waited for it


class UserError(ValueError):
    """An error that the user can fix. The message names the key or file, the value and the fix.

    It is shown without a traceback, and the process exits with its `status`.
    """

    status = REFUSED


class BadNode(UserError):
    """The same request may run on other machines than those that the message names."""

    status = BAD_NODE


class StepError(UserError):
    """What the rows or the values of one training step have caused, raised on all ranks: neither a
    setting nor the machine."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step  # counted from 1

    def with_reason(self, reason: str) -> StepError:
        """This error, whose message goes on with a sentence."""
        self.args = (f"{self}. {reason}",)
        return self

    @property
    def summary(self) -> str:
        """What has happened, without what to do about it."""
        return str(self).partition("; training stops here")[0]


class SpikeError(StepError):
    """A loss far above that of the steps before it."""


def set_step(error: Exception, step: int, rows: Callable[[int], list[int]]) -> None:
    """Note the training step in which `error` was raised, unless it names one itself, and the
    `rows` of that step, which are given for a step from 0."""
    error.__dict__.setdefault("step", step)
    error.__dict__["rows"] = rows(error.__dict__["step"] - 1)


def rows_of(error: Exception) -> list[int]:
    """The rows that `set_step` has noted."""
    return list(getattr(error, "rows", []))


def step_of(error: Exception) -> int | None:
    """The training step in which `error` was raised; None: before the first, or not known."""
    step = getattr(error, "step", None)
    return step if isinstance(step, int) else None


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
