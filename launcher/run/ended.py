"""Whether a run that is to be continued has anything left to train. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from launcher.config import Config
from launcher.folders import manifest
from launcher.folders.checkpoint import Checkpoint, all_checkpoints
from launcher.folders.json_file import COUNT, TEXT, DamagedFile, or_null, read_fields
from launcher.folders.run import RunDir
from launcher.run import resume
from launcher.run.outcome import Outcome, command_again


def nothing_to_do(config: Config) -> str | None:
    """Why the run that `config` continues (resume=auto) would train nothing, and what to type to
    train more; None if it would train, or if that is not known.

    Reads the files of the newest checkpoint: a damaged one is trained again.
    """
    if config.resume != "auto" or not config.run_dir:
        return None
    run = RunDir(Path(config.run_dir).absolute()).newest_attempt()
    outcome = _outcome(run)
    checkpoint = next(iter(all_checkpoints(run.checkpoints)), None)
    if outcome is None or outcome.step is None or checkpoint is None:
        return None
    end = config.training.max_steps
    if end is not None and checkpoint.is_finished and checkpoint.step > end:
        return (
            f"nothing to do: {run.path} is at step {checkpoint.step}, behind "
            f"training.max_steps={end}; to train more: a higher one"
        )
    if not _is_end(checkpoint, outcome, config):
        return None
    is_finished = outcome.reason is None
    said = _finished(run, outcome.step, config) if is_finished else outcome.message(run)
    return f"nothing to do: {said}" if not manifest.problems(checkpoint.manifest) else None


def _outcome(run: RunDir) -> Outcome | None:
    """How the newest attempt ended; None if it did not end in order, or if that is not known."""
    if not run.status.is_file():
        return None
    fields = {"state": TEXT, "reason": or_null(TEXT), "step": or_null(COUNT)}
    try:
        status = read_fields(run.status, **fields)
    except DamagedFile:
        return None
    if status["state"] not in ("finished", "stopped") or status["step"] is None:
        return None
    return Outcome(status["step"], status["reason"])


def _is_end(checkpoint: Checkpoint, outcome: Outcome, config: Config) -> bool:
    """Whether `checkpoint` is of the last step, and `config` asks for no other end."""
    if checkpoint.step != outcome.step or not checkpoint.is_finished:
        return False
    differences, training = resume.compare_configs(checkpoint.config, config), config.training
    evaluates_again = any(each.startswith("data.eval_path:") for each in differences.allowed)
    if differences.breaking or differences.incompatible or evaluates_again:
        return False
    if outcome.reason is None:
        return True
    setting, _, rest = outcome.reason.partition("=")
    if setting == "training.stop_after_steps":
        return (training.stop_after_steps or outcome.step + 1) <= outcome.step
    patience = rest.partition(":")[0]
    is_stalled = setting == "training.early_stopping_patience"
    return is_stalled and patience == str(training.early_stopping_patience)


def _finished(run: RunDir, step: int, config: Config) -> str:
    key = "max_steps" if config.training.max_steps else "epochs"
    return (
        f"{run.path} has finished with step {step}; to train more: {command_again(run)} "
        f"resume_force=true training.{key}=…"
    )
