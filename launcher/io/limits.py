"""Ends work on data and chat templates that takes too long, or too much memory.

A chat template is a program from a model folder, and a row may be any size. Imports no torch.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil

from launcher.errors import UserError

TEMPLATE_SECONDS = 30.0  # of a template, where no setting says otherwise
POLL_SECONDS = 0.1
GROWTH_BYTES = 2_000_000_000  # of the process while one row is worked on
# Below this, another thread may be what allocates: a step of training beside a streamed row.
SECONDS_BEFORE_GROWTH_COUNTS = 0.5

T = TypeVar("T")


class LimitExceeded(Exception):
    """The work was ended; the message continues a sentence: `takes more than 60 s`."""


class _Overrun(BaseException):
    """Raised in the thread that works. Not an Exception: what a template raises is caught."""


@dataclass(eq=False)
class _Watch:
    """The work of one thread. The watchdog measures from when it first sees it."""

    thread: int
    seconds: float
    factor: Callable[[], float]  # by which the time is extended once it has passed
    started: float | None = None  # the thread's CPU time
    memory: int = 0
    is_extended: bool = False
    reason: str = ""  # why it was ended

    def find_reason(self) -> str:
        now = _cpu_seconds(self.thread)
        if self.started is None:
            self.started, self.memory = now, _resident_bytes()
            return ""
        spent = now - self.started
        if spent > self.seconds and not self.is_extended:
            self.is_extended, self.seconds = True, self.seconds * max(1.0, self.factor())
        if spent > self.seconds:
            return f"takes more than {self.seconds:g} s"
        grows = spent > SECONDS_BEFORE_GROWTH_COUNTS
        if grows and _resident_bytes() - self.memory > GROWTH_BYTES:
            return f"needs more than {GROWTH_BYTES / 1e9:g} GB of memory"
        return ""


_lock = threading.Lock()
_watches: dict[int, _Watch] = {}  # thread → its work
_watchdog = threading.Thread()  # not started


def within(seconds: float, work: Callable[[], T], factor: Callable[[], float] = lambda: 1.0) -> T:
    """The result of `work()`, in this thread.

    Raises LimitExceeded once it has used more than `seconds` of CPU time, or when the process has
    grown by more than GROWTH_BYTES meanwhile. `factor`, which costs nothing before `seconds` have
    passed, extends them for large work. Inside of another call, the limits of that one count.
    A single operation of an interpreter's library is not interrupted.
    """
    thread = threading.get_ident()
    if thread in _watches:
        return work()
    _start_watchdog()
    watch = _Watch(thread, seconds, factor)
    try:
        try:
            _watches[thread] = watch
            return work()
        finally:
            _end(watch)
    except _Overrun:
        _end(watch)  # it may have been raised inside of the first call
        raise LimitExceeded(watch.reason) from None


def render_within_limits(work: Callable[[], T]) -> T:
    """The result of `work()`, which renders a chat template.

    Raises UserError if it takes too long, and what the template raises.
    """
    from launcher.io import sandbox  # imports transformers

    sandbox.install()
    try:
        return within(TEMPLATE_SECONDS, work)
    except LimitExceeded as error:
        raise UserError(f"the chat template {error} → a model folder with another one") from error


def _end(watch: _Watch) -> None:
    with _lock:
        _watches.pop(watch.thread, None)
        if watch.reason:  # it may not have been raised yet
            _set_exception(watch.thread, None)


def _start_watchdog() -> None:
    global _watchdog
    if not _watchdog.is_alive():
        with _lock:
            if not _watchdog.is_alive():
                _watchdog = threading.Thread(target=_watch_all, daemon=True, name="limits")
                _watchdog.start()


def _watch_all() -> None:
    while True:
        time.sleep(POLL_SECONDS)
        with _lock:
            for watch in list(_watches.values()):
                if not watch.reason and (reason := watch.find_reason()):
                    watch.reason = reason
                    _set_exception(watch.thread, _Overrun)


def _set_exception(thread: int, error: type[BaseException] | None) -> None:
    """Have `thread` raise `error` at its next bytecode; None: nothing after all."""
    raised = ctypes.py_object(error) if error else ctypes.py_object()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _cpu_seconds(thread: int) -> float:
    """The CPU time of a thread: a busy machine or a suspended process does not count. Where the
    system does not have it (macOS), the time."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
