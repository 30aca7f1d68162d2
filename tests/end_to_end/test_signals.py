"""Signals to the launcher, its agent and its ranks, and processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.folders.checkpoint import newest_checkpoint
from tests.helpers.commands import (
    LONG,
    PATIENCE_SECONDS,
    TRAIN_TINY,
    losses,
    processes_of,
    shardway,
    start,
    status,
    the_agent,
    the_rank,
    wait_for_training,
    wait_until,
    wait_until_none_is_left,
)

pytestmark = pytest.mark.slow

SOON_SECONDS = 20  # on a busy machine; torchrun's patience with a rank alone is 30


def ranks_of(run: Path) -> list[int]:
    """The ranks that exist, even those that have imported nothing yet."""
    ours = map(psutil.Process, processes_of(run))
    return [each.pid for each in ours if "launcher.cluster.agent" not in each.cmdline()]


def started(tmp_path: Path, ranks: int = 0) -> tuple[subprocess.Popen[str], Path]:
    """A run that has just made its folder and started so many ranks."""
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run folder: ")
    run = tmp_path / "run"
    end = time.monotonic() + PATIENCE_SECONDS
    while len(ranks_of(run)) < ranks:
        assert time.monotonic() < end
    return process, run


def test_sigterm_to_every_process_is_one_request(tiny: Path, tmp_path: Path) -> None:
    """As systemd, a cgroup and a container do; what they send within seconds is one request."""
    process = start(*TRAIN_TINY, *LONG, "method.dropout=0.1", "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    everyone = [process.pid, *processes_of(run)]
    assert len(everyone) >= 4, "the launcher, the agent and two ranks"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.1)  # of signals that wait at the same time the lowest number comes first
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, output
    ended = status(run)
    assert (ended["state"], ended["reason"]) == ("stopped", "SIGTERM")
    assert f"stopped after step {ended['step']} (SIGTERM); resume: shardway resume {run}" in output
    assert newest_checkpoint(run / "checkpoints").step == ended["step"]
    assert not (run / "stop").exists()
    wait_until_none_is_left(run)
    words = (*TRAIN_TINY, *LONG, "method.dropout=0.1")
    more = f"training.stop_after_steps={ended['step'] + 5}"
    for each in (("run_dir=run", "resume=auto"), ("run_dir=whole",)):
        done = shardway(*words, *each, more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(tmp_path / "whole"), "to the bit"


def test_sigterm_to_the_agent_alone_saves(tiny: Path, tmp_path: Path) -> None:
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    the_agent(run).terminate()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, output
    step = status(run)["step"]
    assert output.splitlines()[-1].startswith(f"stopped after step {step} (SIGTERM); resume: ")
    assert newest_checkpoint(run / "checkpoints").step == step


def test_sigterm_to_every_process_while_the_agent_starts_is_one_request(
    tiny: Path, tmp_path: Path
) -> None:
    process, run = started(tmp_path)
    wait_until(process, lambda: processes_of(run) != [])
    for pid in (process.pid, *processes_of(run)):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, output
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 0)


@pytest.mark.parametrize(
    "delay",
    [0.0, *(pytest.param(each, marks=pytest.mark.whole) for each in (0.1, 0.3, 0.6, 1, 2, 4))],
)
def test_an_agent_that_is_killed_while_ranks_start_leaves_none(
    tiny: Path, tmp_path: Path, delay: float
) -> None:
    process, run = started(tmp_path, ranks=1)
    time.sleep(delay)
    the_agent(run).kill()
    killed = time.monotonic()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert "torchrun was ended by signal SIGKILL" in output
    wait_until_none_is_left(run)
    assert time.monotonic() - killed < SOON_SECONDS


def test_a_run_whose_launcher_is_killed_saves_and_ends(tiny: Path, tmp_path: Path) -> None:
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    wait_for_training(process, run)
    process.kill()
    wait_until_none_is_left(run)
    ended = status(run)
    assert (ended["state"], ended["reason"]) == ("stopped", "SIGTERM")
    assert newest_checkpoint(run / "checkpoints").step == ended["step"]


def test_a_rank_that_is_killed_while_others_start_ends_the_run_soon(
    tiny: Path, tmp_path: Path
) -> None:
    process, run = started(tmp_path, ranks=2)
    the_rank(run, 1).kill()
    killed = time.monotonic()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert time.monotonic() - killed < SOON_SECONDS
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 failed: ended by signal SIGKILL" in output
    assert processes_of(run) == []
