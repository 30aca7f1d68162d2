"""How an attempt ended: its file status.json, because torchrun passes no exit status on. No torch.

`finished` is an attempt that has done its planned last step, and no other.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from launcher.errors import HUNG, REFUSED, STOPPED
from launcher.folders import manifest
from launcher.folders.json_file import TEXT, DamagedFile, read_fields
from launcher.folders.run import RunDir


def command_again(run: RunDir, launcher: str = "shardway train") -> str:
    """What continues the run with its frozen configuration, which further overrides may change."""
    path = shlex.quote(str(run.path))
    return f"{launcher} --config-path {path} --config-name config resume=auto"


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    step: int | None  # the last step; None: that of a checkpoint, whose files were not read yet
    reason: str | None  # why it ended before its schedule did; None: the last step is done

    @property
    def is_planned(self) -> bool:
        """Whether a setting ended it, or its schedule."""
        return self.reason is None or self.reason.startswith("training.")

    def message(self, run: RunDir) -> str:
        """What to tell the user: how it ended, and what comes next."""
        if self.reason is None:
            return f"finished with step {self.step}; to export it: shardway consolidate {run.path}"
        command = f"shardway resume {run.path}"  # without training.stop_after_steps
        if self.reason.startswith("training.early_stopping"):
            command = f"{command_again(run)} {self.reason.partition('=')[0]}=null"
        if self.step == 0:
            return (
                f"stopped before the first step ({self.reason}), without a checkpoint; start it "
                f"again: {command_again(run)}"
            )
        when = "before it trained" if self.step is None else f"after step {self.step}"
        return f"stopped {when} ({self.reason}); resume: {command}"


def write_status(run: RunDir, outcome: Outcome) -> None:
    """Write how this attempt ended. A request to stop is fulfilled then."""
    status = {
        "state": "finished" if outcome.reason is None else "stopped",
        "reason": outcome.reason,
        "step": outcome.step,
        "exit_code": 0 if outcome.is_planned else STOPPED,
    }
    manifest.write_json(run.status, status)
    run.stop.unlink(missing_ok=True)


def ended_in_order(run: RunDir) -> bool:
    """Whether this attempt has done what was asked of it, or has been replaced: neither is a
    failure. A status that cannot be read counts, because nobody knows what it says."""
    if not run.status.is_file():
        return False
    try:
        state = read_fields(run.status, state=TEXT)["state"]
    except DamagedFile:
        return True
    return state in ("finished", "stopped", "superseded")


def write_superseded(run: RunDir, reason: str) -> None:
    """Write that a newer attempt has replaced this one. A request to stop is not for it."""
    status = {"state": "superseded", "reason": reason, "step": None, "exit_code": REFUSED}
    manifest.write_json(run.status, status)


def write_hung(run: RunDir, reason: str) -> None:
    """Write that nothing moved any more in this attempt. `reason`: which rank the others waited
    for. A request to stop stays: no other attempt is to follow it."""
    status = {"state": "hung", "reason": reason, "step": None, "exit_code": HUNG}
    manifest.write_json(run.status, status)
