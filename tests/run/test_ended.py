"""Whether a run that is to be continued has anything left to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import Config, store
from launcher.config.compose import compose
from launcher.folders import manifest
from launcher.folders.run import RunDir
from launcher.run.ended import nothing_to_do
from launcher.run.outcome import Outcome, write_status

BASE = ("model=tiny", "training.max_steps=4", "training.epochs=null")
STALLED = "training.early_stopping_patience=2: eval_loss has not improved in 2 evaluation(s)"


def ended_run(path: Path, step: int, reason: str | None, *overrides: str) -> Path:
    """A run that ended after `step`, without the tensors of its checkpoint. Returns that."""
    run = RunDir(path)
    run.logs.mkdir(parents=True)
    write_status(run, Outcome(step, reason))
    checkpoint = run.checkpoints / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(store.dump(composed(path, *overrides)))
    (checkpoint / "tensors").write_text("1 2 3")
    manifest.write(checkpoint / "manifest.json", {"step": step, "content": "all", "base": {}})
    return checkpoint


def composed(path: Path, *overrides: str) -> Config:
    return compose([*BASE, f"run_dir={path}", "resume=auto", *overrides])


@pytest.mark.parametrize(
    ("reason", "settings", "again", "said"),
    [
        (None, (), (), "has finished with step 3; to train more: shardway train --config-path "),
        (None, (), ("training.max_steps=5", "resume_force=true"), None),
        (None, (), ("data.eval_path=other.jsonl",), None),
        ("SIGTERM", (), (), None),
        (
            "training.stop_after_steps=3",
            ("training.stop_after_steps=3",),
            ("training.stop_after_steps=3",),
            "stopped after step 3 (training.stop_after_steps=3); resume: shardway resume ",
        ),
        ("training.stop_after_steps=3", ("training.stop_after_steps=3",), (), None),
        (
            STALLED,
            ("training.early_stopping_patience=2", "data.eval_rows=5"),
            ("training.early_stopping_patience=2", "data.eval_rows=5"),
            "early_stopping_patience=null",
        ),
        (
            STALLED,
            ("training.early_stopping_patience=2", "data.eval_rows=5"),
            ("training.early_stopping_patience=3", "data.eval_rows=5"),
            None,
        ),
    ],
)
def test_how_the_run_ended_and_what_is_asked_for_decide(
    tmp_path: Path, reason: str | None, settings: tuple[str, ...], again: tuple[str, ...],
    said: str | None,
) -> None:  # fmt: skip
    ended_run(tmp_path, 3, reason, *settings)
    message = nothing_to_do(composed(tmp_path, *again))
    assert (message is None) == (said is None)
    assert said is None or said in str(message)


def test_a_run_that_is_behind_its_end_is_not_started(tmp_path: Path) -> None:
    ended_run(tmp_path, 3, "SIGTERM")
    said = nothing_to_do(composed(tmp_path, "training.max_steps=2", "resume_force=true"))
    assert "is at step 3, behind training.max_steps=2" in str(said)


def test_what_is_said_at_the_end_leads_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert Outcome(4, None).message(run).endswith(f"shardway consolidate {tmp_path}")
    again = f"shardway train --config-path {tmp_path} --config-name config resume=auto"
    said = Outcome(0, "SIGTERM").message(run)
    assert said.endswith(f"without a checkpoint; start it again: {again}")
    said = Outcome(None, "SIGTERM").message(run)
    assert said == f"stopped before it trained (SIGTERM); resume: shardway resume {tmp_path}"


def test_a_damaged_checkpoint_and_an_attempt_without_an_end_are_trained_again(
    tmp_path: Path,
) -> None:
    checkpoint = ended_run(tmp_path, 4, None)
    assert nothing_to_do(composed(tmp_path))
    assert nothing_to_do(composed(tmp_path, "resume=none")) is None
    (checkpoint / "tensors").write_text("1 2 4")
    assert nothing_to_do(composed(tmp_path)) is None
    (checkpoint / "tensors").write_text("1 2 3")
    RunDir(tmp_path).status.write_text("{")
    assert nothing_to_do(composed(tmp_path)) is None
    RunDir(tmp_path, 2).logs.mkdir()
    assert nothing_to_do(composed(tmp_path)) is None
