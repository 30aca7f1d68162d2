"""Jobs that are preempted, lose a node, reach the requeue limit, or belong to another user."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.commands import SHARDWAY, losses, shardway
from tests.helpers.slurm import LONG, Slurm, out_of, submit

OVER = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED")
SAVED = (*LONG, "checkpoint.save_steps=20")


def steps(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").is_file() else 0


def statuses(run: Path) -> list[dict[str, object]]:
    return [json.loads(p.read_text()) for p in sorted(run.glob("logs/attempt-*/status.json"))]


def assert_as_never_disturbed(run: Path, ranks: int, words: tuple[str, ...]) -> None:
    near = run.with_name("near")
    options = (f"cluster.nproc_per_node={ranks}", f"run_dir={near}")
    done = shardway("train", *options, *words, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(near), "to the bit"


def ranks_of(run: Path, attempt: int) -> list[psutil.Process]:
    words = ["launcher.worker", str(run), str(attempt)]
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if (each.info["cmdline"] or [])[-3:] == words]


def test_a_preempted_job_saves_and_resumes_later(slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    job, far = submit(slurm, tmp_path, "cluster.nodes=2", "run_dir=far", *LONG), tmp_path / "far"
    slurm.until(lambda: steps(far) > 20, 120)
    words = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = slurm.ask("sbatch", "--parsable", *words, "--wrap=sleep 3").strip()
    slurm.until(lambda: slurm.state(other) == "COMPLETED", 90)
    slurm.until(lambda: slurm.state(job) in OVER, 180)
    assert slurm.state(job) == "COMPLETED", out_of(far)
    assert [each["state"] for each in statuses(far)] == ["stopped", "finished"]
    assert statuses(far)[0]["reason"] == "SIGUSR2"
    assert_as_never_disturbed(far, 2, LONG)


@pytest.mark.whole
def test_a_killed_rank_is_restarted_in_the_same_job(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    words = ("cluster.nproc_per_node=2", "run_dir=far", "cluster.max_restarts=1", *SAVED)
    job, far = submit(slurm, tmp_path, *words), tmp_path / "far"
    slurm.until(lambda: steps(far) > 30, 120)
    ranks_of(far, 1)[0].kill()
    slurm.until(lambda: slurm.state(job) in OVER, 240)
    assert slurm.state(job) == "COMPLETED", out_of(far)
    assert "restarting in the same job" in out_of(far)
    assert [each["state"] for each in statuses(far)] == ["finished"]
    jobs = [json.loads((far / f"logs/attempt-{n}/job.json").read_text()) for n in (1, 2)]
    assert [(each["job"], each["restarts"]) for each in jobs] == [(job, 0)] * 2
    assert_as_never_disturbed(far, 2, SAVED)


@pytest.mark.whole
@pytest.mark.timeout(600)
def test_a_failed_node_is_replaced_and_its_old_attempt_writes_nothing(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    """Its daemon is killed; its attempt keeps training and saving until another one has started."""
    words = (*SAVED, "training.max_steps=100000", "checkpoint.keep_last=3")
    job, far = submit(slurm, tmp_path, "run_dir=far", *words), tmp_path / "far"
    slurm.until(lambda: steps(far) > 20, 120)
    node = slurm.node_of(job)
    slurm.kill_node(node)
    slurm.until(lambda: (far / "logs/attempt-2/job.json").is_file(), 120)
    slurm.until(lambda: ranks_of(far, 1) == [], 30)
    error = json.loads((far / "logs/attempt-1/rank-00.error.json").read_text())
    assert f"attempt 2 of {far} has started" in error["message"]
    at = steps(far)
    slurm.until(lambda: steps(far) > at, 60)
    assert "resumed from step-" in out_of(far)
    assert slurm.node_of(job) != node
    (far / "stop").touch()
    slurm.until(lambda: slurm.state(job) in OVER, 60)
    assert slurm.state(job) == "COMPLETED", out_of(far)
    lines = [json.loads(line)["step"] for line in (far / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1)), "no step twice, none left out"
    slurm.start_node(node)
    slurm.until_idle()


@pytest.mark.whole
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lost", ["n1", "n2"], ids=["rank 0 and the script", "another rank"])
def test_a_disconnected_node_is_replaced(
    apart: Slurm, tiny: Path, tmp_path: Path, lost: str
) -> None:
    words = (*SAVED, "training.max_steps=600")
    job = submit(apart, tmp_path, "cluster.nodes=2", "run_dir=far", *words)
    far = tmp_path / "far"
    apart.until(lambda: steps(far) > 30, 120)
    stale = ranks_of(far, 1)
    apart.cut(lost)
    apart.until(lambda: (far / "logs/attempt-2/job.json").is_file(), 300)
    alive = [rank for rank in stale if rank.is_running()]
    if lost == "n1":
        assert alive, "the attempt on the other side does not know that it was given up"
    apart.until(lambda: apart.state(job) in OVER, 240)
    assert apart.state(job) == "COMPLETED", out_of(far)
    apart.mend(lost)
    apart.until(lambda: not any(rank.is_running() for rank in alive), 60)
    assert [each["state"] for each in statuses(far)] == ["finished"], "attempt 1 said nothing more"
    assert_as_never_disturbed(far, 2, words)


def test_a_job_fails_at_the_requeue_limit_and_can_be_resumed_manually(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    words = (*LONG, "cluster.requeue_limit=0", "training.max_steps=5000")
    job, far = submit(slurm, tmp_path, "run_dir=far", *words), tmp_path / "far"
    slurm.until(lambda: steps(far) > 3, 120)
    slurm.ask("scancel", "--signal=USR2", job)
    slurm.until(lambda: slurm.state(job) in OVER, 120)
    assert slurm.state(job) == "FAILED"
    assert "ExitCode=75:0" in slurm.ask("scontrol", "show", "job", "-o", job)
    assert "not queued again: cluster.requeue_limit=0 is reached" in out_of(far)
    again = subprocess.run(
        [*SHARDWAY, "resume", str(far)], env=slurm.environment, capture_output=True, text=True
    )
    newer = re.search(r"job (\d+) is in the queue", again.stdout)
    assert newer, again.stderr
    at = steps(far)
    slurm.until(lambda: steps(far) > at, 60)
    slurm.ask("scancel", newer[1])


@pytest.fixture
def anyone(slurm: Slurm, tiny: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder and an environment for the user nobody, with this Python and the checkout mounted
    in the folder so that nobody may read them."""
    home = Path(tempfile.mkdtemp(prefix="nobody-"))
    shutil.copytree(tiny, home / "tiny")
    for path in (home, *home.rglob("*")):
        shutil.chown(path, "nobody")
    packages = Path(torch.__file__).parents[1]
    checkout = Path(__file__).parents[2]
    mounts = {"python": sys.base_prefix, "packages": packages, "checkout": checkout}
    with contextlib.ExitStack() as mounted:
        mounted.callback(shutil.rmtree, home)
        for name, source in mounts.items():
            (home / name).mkdir()
            if subprocess.run(["mount", "--bind", source, home / name]).returncode != 0:
                pytest.skip("this machine lets nobody mount")
            mounted.callback(subprocess.run, ["umount", home / name], check=True)
        yield (
            home,
            {
                **slurm.environment,
                "HOME": str(home),
                "SHARDWAY_CACHE": str(home / "cache"),
                "LD_LIBRARY_PATH": str(home / "python/lib"),
                "PYTHONPATH": f"{home / 'checkout'}:{home / 'packages'}",
            },
        )


def test_a_user_without_privileges_trains(
    slurm: Slurm, anyone: tuple[Path, dict[str, str]]
) -> None:
    home, environment = anyone
    python = home / "python/bin" / Path(sys.executable).resolve().name
    words = (*LONG, f"model.name_or_path={home / 'tiny'}", "training.max_steps=3", "run_dir=far")
    done = subprocess.run(
        ["runuser", "-u", "nobody", "--", str(python), "-m", "launcher.cli", "train",
         "cluster=slurm", *words],
        cwd=home, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    job = re.search(r"job (\d+) is in the queue", done.stdout)
    assert job, done.stdout + done.stderr
    slurm.until(lambda: slurm.state(job[1]) in OVER, 120)
    far = home / "far"
    assert slurm.state(job[1]) == "COMPLETED", out_of(far)
    assert {path.stat().st_uid for path in far.rglob("*")} == {home.stat().st_uid} != {0}
    assert steps(far) == 3


@pytest.mark.whole
@pytest.mark.timeout(600)
def test_a_rank_that_is_stopped_on_another_node_is_named_and_the_job_requeued(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    more = ("cluster.nodes=2", "cluster.hang_seconds=8", "cluster.requeue_hung=true")
    words = (*SAVED, "training.max_steps=300")
    job = submit(slurm, tmp_path, *more, "run_dir=far", *words)
    far = tmp_path / "far"
    slurm.until(lambda: steps(far) > 20, 240)
    rank = psutil.Process(
        json.loads((far / "logs/attempt-1/rank-01.process.json").read_text())["pid"]
    )
    rank.suspend()
    slurm.until(lambda: (far / "logs/attempt-2/job.json").is_file(), 120)
    (hung,) = statuses(far)[:1]
    assert hung["state"] == "hung"
    assert re.match(r"rank 1 on \S+ is stopped by a signal", str(hung["reason"]))
    assert "1 other wait" in str(hung["reason"])
    assert len(list((far / "logs/attempt-1").glob("hang-0[01].txt"))) == 2
    assert f"hung: {hung['reason']}" in out_of(far)
    slurm.until(lambda: slurm.state(job) in OVER, 240)
    assert slurm.state(job) == "COMPLETED", out_of(far)


@pytest.mark.whole
@pytest.mark.timeout(600)
def test_a_node_that_does_not_answer_is_named(slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    """Its agent and its rank are stopped; the job ends, because nobody asked to requeue it."""
    words = ("cluster.nodes=2", "cluster.hang_seconds=8", "run_dir=far", *SAVED)
    job = submit(slurm, tmp_path, *words, "training.max_steps=100000")
    far = tmp_path / "far"
    slurm.until(lambda: steps(far) > 20, 240)
    rank = psutil.Process(
        json.loads((far / "logs/attempt-1/rank-01.process.json").read_text())["pid"]
    )
    rank.parent().suspend()
    rank.suspend()
    slurm.until(lambda: slurm.state(job) in OVER, 120)
    assert "ExitCode=76:0" in slurm.ask("scontrol", "show", "job", "-o", job)
    assert "hung: node 1 (rank 1) does not answer" in out_of(far)
