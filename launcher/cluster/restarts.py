"""Restart a run that has failed, in its folder and from its newest whole checkpoint. No torch.

RUN/logs/failures.jsonl has a line for each attempt that failed, restarted or not: attempt, time,
step, saved (the step of the newest checkpoint), rank, exit_code, kind, message and rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.cluster import local
from launcher.cluster.local import Failure
from launcher.config import Config, store
from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.checkpoint import finished_checkpoints
from launcher.folders.json_file import COUNT, TEXT, or_null, read_fields
from launcher.folders.run import RunDir
from launcher.run import create
from launcher.run.metrics import Glance
from launcher.run.outcome import command_again, ended_in_order
from launcher.run.rank_log import say

SAME_STEP = 3  # failures of one step, one after another, after which it is not the machine
MAX_WAIT_SECONDS = 60.0  # before an attempt, if those before it have not come to a step
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Failed:
    """An attempt that failed."""

    attempt: int
    failure: Failure | None  # None: not known
    saved: int  # the step of the newest checkpoint, 0 without one

    @property
    def step(self) -> int | None:
        return self.failure.step if self.failure else None

    @property
    def where(self) -> str:
        return f"in step {self.step}" if self.step else "before its first step"

    def record(self) -> dict[str, Any]:
        """Its line in failures.jsonl."""
        failure = dataclasses.asdict(self.failure) if self.failure else {}
        return {"attempt": self.attempt, "time": time.time(), "saved": self.saved, **failure}


def run_attempts(
    run: RunDir, config: Config, world_size: int, start: Callable[[RunDir], int]
) -> int:
    """Start the attempt `run`, and another one after each failure, as often as cluster.max_restarts
    of its frozen `config` allows. Returns the exit status of the last attempt.

    `start` runs an attempt until all its ranks have ended, and returns its exit status.
    """
    failed: list[Failed] = []
    try:
        while True:
            status = start(run)
            asked_to_stop = run.stop.exists()
            if status == 0 or asked_to_stop or ended_in_order(run):
                return status
            failed.append(_failed(run))
            _write(run, failed[-1])
            if why_not := reason_not_to_restart(failed, config.cluster.max_restarts):
                if config.cluster.max_restarts:
                    say(run, f"not restarted: {why_not}")
                return status
            say(run, _restarting(run, failed, config.cluster.max_restarts))
            if _asked_to_stop_within(run, _seconds_to_wait(failed)):
                return status
            try:
                run, config = _next_attempt(run, config, world_size)
            except OSError as error:  # such as a full disk
                say(run, f"not restarted: {error.filename or run.path}: {error.strerror}")
                return status
    finally:
        run.stop.unlink(missing_ok=True)
        run.starter.unlink(missing_ok=True)


def reason_to_end(run: RunDir, max_restarts: int, attempts: Collection[int]) -> str | None:
    """Note that the attempt `run` of a job has failed, after its earlier `attempts`. Returns why no
    other one follows, None if one does."""
    failed = [each for each in _read(run) if each.attempt in attempts]
    failed.append(_failed(run))
    _write(run, failed[-1])
    return reason_not_to_restart(failed, max_restarts)


def reason_not_to_restart(failed: list[Failed], max_restarts: int) -> str | None:
    """Why no attempt follows those that `failed` one after another, as a sentence; None if one
    does."""
    last = failed[-1]
    kind = last.failure.kind if last.failure else "error"
    if kind == "spike":
        return "training.on_spike asks for the end"
    if last.step is None and kind in ("refused", "error", "memory"):
        return "it failed before its first step, and would fail again"
    same = _same_step(failed)
    if kind == "memory" and len(same) > 1 and all(_is_memory(each) for each in same[-2:]):
        return f"step {last.step} has run out of memory again"
    if len(same) >= SAME_STEP:
        return _report(same)
    if len(failed) > max_restarts:
        return f"cluster.max_restarts={max_restarts} is reached"
    return None


def _is_memory(failed: Failed) -> bool:
    return failed.failure is not None and failed.failure.kind == "memory"


def _same_step(failed: list[Failed]) -> list[Failed]:
    """The last attempts, all of which failed in one known step."""
    same: list[Failed] = []
    for each in reversed(failed):
        if each.step is None or each.step != failed[-1].step:
            break
        same.insert(0, each)
    return same


def _report(same: list[Failed]) -> str:
    """What is known of a step that fails each time."""
    last = same[-1]
    attempts = ", ".join(str(each.attempt) for each in same)
    lines = [
        f"step {last.step} has failed {len(same)} times (attempts {attempts}), each time from the "
        f"checkpoint of step {last.saved} or before: it is its rows, its values or its memory, "
        "rarely the machine"
    ]
    if last.failure:
        lines.append(f"  error: {last.failure.message}")
        if rows := local.describe_rows(last.failure):
            lines.append(f"  {rows}")
    lines.append(
        "  to try: look at these rows and at the log of the rank; for values that are not finite, "
        "training.on_spike=rewind leaves the batch out, or a lower optimizer.learning_rate; if "
        "memory ran out, a smaller training.micro_batch_size or data.max_length"
    )
    return "\n".join(lines)


def _failed(run: RunDir) -> Failed:
    """What the ranks and the agent say of an attempt that failed."""
    try:
        failure = _stated(run) or local.first_failure(run)
    except UserError:  # a damaged report: the attempt itself has said so
        failure = None
    step = failure.step if failure else None
    if step is None and run.steps.is_file():  # the ranks have begun to train
        step = int(Glance.of(run.metrics).newest.get("step", 0)) + 1
    if failure is None:
        failure = Failure(0, 1, "the ranks ended without an error message", "killed")
    checkpoints = finished_checkpoints(run.checkpoints)
    saved = checkpoints[0].step if checkpoints else 0
    return Failed(run.attempt, dataclasses.replace(failure, step=step), saved)


def _stated(run: RunDir) -> Failure | None:
    """What the status of an attempt says that has ended, but not in order; None without one."""
    if not run.status.is_file():
        return None
    status = read_fields(run.status, state=TEXT, reason=or_null(TEXT), exit_code=COUNT)
    return Failure(0, status["exit_code"], status["reason"] or status["state"], status["state"])


def _read(run: RunDir) -> list[Failed]:
    """The attempts in failures.jsonl, without lines that are damaged."""
    found: list[Failed] = []
    if not run.failures.is_file():
        return found
    names = [field.name for field in dataclasses.fields(Failure)]
    for line in regular.read_text(run.failures).splitlines():
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            failure = Failure(**{name: record[name] for name in names})
            found.append(Failed(int(record["attempt"]), failure, int(record["saved"])))
    return found


def _write(run: RunDir, failed: Failed) -> None:
    """Append to failures.jsonl; training goes on if the disk is full."""
    line = json.dumps(failed.record()) + "\n"
    try:
        file = regular.open_descriptor(run.failures, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(file, "wb") as opened:
            opened.write(line.encode())
    except OSError as error:
        say(run, f"{run.failures} cannot be written: {error.strerror}")


def _restarting(run: RunDir, failed: list[Failed], max_restarts: int) -> str:
    last = failed[-1]
    begin = f"the checkpoint of step {last.saved}" if last.saved else "the beginning"
    return (
        f"attempt {last.attempt} failed {last.where}; restart {len(failed)} of "
        f"cluster.max_restarts={max_restarts}: attempt {run.attempt + 1} goes on from {begin}"
    )


def _seconds_to_wait(failed: list[Failed]) -> float:
    """None after an attempt that trained; otherwise longer each time."""
    idle = 0
    for each in reversed(failed):
        if each.step is not None:
            break
        idle += 1
    return 0.0 if not idle else min(MAX_WAIT_SECONDS, 2.0**idle)


def _asked_to_stop_within(run: RunDir, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not run.stop.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_SECONDS)
    say(run, f"stopped before the next attempt; resume: {command_again(run)}")
    return True


def _next_attempt(run: RunDir, config: Config, world_size: int) -> tuple[RunDir, Config]:
    """Start the attempt after `run`, with what its ranks have chosen and frozen."""
    try:
        config = store.load(run.config)
    except UserError as error:
        say(run, f"{error}: it is written again")
    resume = "auto" if config.resume == "none" else config.resume
    config = dataclasses.replace(config, resume=resume)
    started = create.start_attempt_in(run, config, sys.argv, world_size, follows=run.attempt)
    run.starter.unlink(missing_ok=True)
    return started
