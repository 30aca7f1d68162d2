"""Runs in which nothing moves any more: which rank is named, and how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import HUNG
from tests.helpers.commands import (
    LONG,
    PATIENCE_SECONDS,
    TRAIN_TINY,
    losses,
    processes_of,
    shardway,
    start,
    status,
    the_rank,
    wait_for_training,
    wait_until,
)
from tests.helpers.hangs import plan_hang, read_fifo, sleep, spin, work

pytestmark = pytest.mark.slow

LIMIT = "cluster.hang_seconds=5"
STEP_BATCH = "launcher.data.loader:Loader.step_batch"


def reason_of(process: subprocess.Popen[str], run: Path) -> str:
    """Wait for the end of a run that hangs; the reason that it gives everywhere."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == HUNG, output
    ended = status(run)
    assert (ended["state"], ended["exit_code"]) == ("hung", HUNG)
    assert f"\nhung: {ended['reason']}\n" in output
    assert processes_of(run) == []
    assert "=== rank 1 on " in (run / "logs/attempt-1/hang-00.txt").read_text()
    return str(ended["reason"])


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.whole)])
def test_a_rank_that_is_stopped_is_named(tiny: Path, tmp_path: Path, rank: int) -> None:
    process = start(*TRAIN_TINY, *LONG, LIMIT, "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    the_rank(run, rank).send_signal(signal.SIGSTOP)
    reason = reason_of(process, run)
    assert re.match(rf"rank {rank} on \S+ is stopped by a signal", reason)
    assert "1 other wait" in reason
    assert f"hung: {reason}"[:40][6:] in shardway("runs", "run", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("action", "words"),
    [
        pytest.param(sleep, "for step", marks=pytest.mark.whole),
        pytest.param(spin, "and keeps a processor busy", marks=pytest.mark.whole),
        pytest.param(read_fifo, "for step", marks=pytest.mark.whole),
    ],
    ids=["sleeps", "spins", "reads"],
)
def test_a_rank_in_the_data_loader_is_named(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], None],
    words: str,
) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv("HANG_FIFO", str(tmp_path / "fifo"))
    now = plan_hang(tmp_path, monkeypatch, STEP_BATCH, action)
    process = start(*TRAIN_TINY, *LONG, LIMIT, "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    now.touch()
    reason = reason_of(process, run)
    assert re.match(r"rank 1 on \S+ is in the data loader", reason)
    assert words in reason
    stacks = (run / "logs/attempt-1/hang-00.txt").read_text()
    assert f"in {action.__name__}\n" in stacks


@pytest.mark.whole
def test_a_rank_that_hangs_while_saving_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = plan_hang(
        tmp_path, monkeypatch, "launcher.checkpoint.save:Saver._write_rank_files", sleep
    )
    more = (LIMIT, "checkpoint.save_steps=5", "run_dir=run")
    process = start(*TRAIN_TINY, *LONG, *more, cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    now.touch()
    assert re.match(r"rank 1 on \S+ is saving after step", reason_of(process, run))


def test_a_run_that_hangs_ends_soon_after_sigterm(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit of auto, which is minutes."""
    now = plan_hang(tmp_path, monkeypatch, STEP_BATCH, sleep)
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    now.touch()
    at = -1
    while at != len(losses(run)):  # until it stands still
        at = len(losses(run))
        time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert re.match(r"rank 1 on \S+ is in the data loader", reason_of(process, run))
    assert not (run / "stop").exists()


@pytest.mark.whole
def test_what_takes_longer_than_the_limit_and_computes_is_no_hang(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank evaluates for longer than the limit; the other waits for it."""
    now = plan_hang(tmp_path, monkeypatch, "launcher.training.loop:token_loss", work)
    now.touch()
    words = ("training.epochs=null", "training.max_steps=3", "training.global_batch_size=4")
    more = ("data.eval_rows=2", "training.eval_steps=3", LIMIT, "run_dir=run")
    done = shardway(*TRAIN_TINY, *words, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "run/logs/attempt-1").glob("hang*"))


@pytest.mark.whole
def test_without_a_limit_nothing_is_watched(tiny: Path, tmp_path: Path) -> None:
    process = start(*TRAIN_TINY, *LONG, "cluster.hang_seconds=0", "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    rank = the_rank(run, 1)
    rank.send_signal(signal.SIGSTOP)
    time.sleep(8)
    assert process.poll() is None
    rank.send_signal(signal.SIGCONT)
    at = len(losses(run))
    wait_until(process, lambda: len(losses(run)) > at)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75
