"""Early stopping and a schedule that follows the evaluations, through the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher.folders.checkpoint import newest_checkpoint
from tests.helpers.commands import TRAIN_TINY, metrics, shardway, status

pytestmark = pytest.mark.slow


def test_early_stopping_succeeds_and_reports_how_to_resume(tiny: Path, tmp_path: Path) -> None:
    done = shardway(
        *(*TRAIN_TINY, "training.epochs=null", "training.max_steps=6", "run_dir=run"),
        *("data.eval_rows=5", "training.eval_steps=1", "scheduler=reduce_lr_on_plateau"),
        *("scheduler.patience=0", "scheduler.factor=0.5", "scheduler.threshold=0.9"),
        *("training.early_stopping_patience=2", "training.early_stopping_threshold=5"),
        *("checkpoint.save_best=true", "checkpoint.keep_last=1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    ended = status(run)
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("stopped", 3, 0)
    said = "training.early_stopping_patience=2: eval_loss has not improved in 2 evaluation(s); "
    assert ended["reason"].startswith(said + "the lowest is ")
    assert newest_checkpoint(run / "checkpoints").step == 3
    (line,) = re.findall(r"stopped after step 3 \(.*\); resume: shardway (.*)", done.stdout)
    assert line.endswith("resume=auto training.early_stopping_patience=null")
    done = shardway("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing to do: stopped after step 3 (training.early_stopping_")
    assert not (run / "logs/attempt-2").exists()
    done = shardway(*shlex.split(line), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rates = [record["learning_rate"] for record in metrics(run) if "loss" in record]
    assert rates == [1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6], "over the stop, too"


def test_a_warm_up_longer_than_the_epochs_is_refused_once_rows_are_counted(
    tiny: Path, tmp_path: Path
) -> None:
    words = ("training.epochs=1", "scheduler.warmup_steps=1000", "run_dir=run")
    done = shardway(*TRAIN_TINY, *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    said = r"scheduler.warmup_steps=1000 is more than the \d+ steps of training.epochs=1: the peak"
    assert re.search(said, done.stdout + done.stderr)
