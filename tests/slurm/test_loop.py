"""The full cycle on a real Slurm: queued, trained, stopped, queued again, finished."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster.slurm import script_path
from tests.helpers.commands import SHARDWAY, losses, shardway
from tests.helpers.slurm import LONG, Slurm, out_of, submit, verb

QUICK = ("training.epochs=null", "training.max_steps=6", "training.global_batch_size=8")


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero2", marks=pytest.mark.whole)])
def test_two_nodes_give_the_same_losses_as_two_local_ranks(
    slurm: Slurm, tiny: Path, tmp_path: Path, strategy: str
) -> None:
    words = ("model=tiny", f"strategy={strategy}", *QUICK)
    container = (
        'cluster.container=["env","INSIDE=1"]',
        f"cluster.container_python={sys.executable}",
    )
    job = submit(slurm, tmp_path, "cluster.nodes=2", "run_dir=far", *container, *words)
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 120)
    out = next((tmp_path / "far/logs").glob("slurm-*.out")).read_text()
    assert slurm.state(job) == "COMPLETED", out
    done = shardway("train", "cluster.nproc_per_node=2", "run_dir=near", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    for name in ("far", "near"):  # one was chosen by the ranks, the other before they started
        assert "precision:\n  name: fp32\n" in (tmp_path / name / "config.yaml").read_text()


def test_sbatch_accepts_overrides_and_values_with_special_characters(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    """Submission with sbatch directly, with the first Python on PATH, and with the common habit of
    a task for each rank: still one agent trains on each node."""
    name = "a b,c $(touch hit) `touch hit` é"
    (tmp_path / name).mkdir()
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    words = ("model=tiny", "strategy=fsdp", *QUICK, f"run_dir='{name}/run'")
    done = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=3", str(script_path()), *words],
        cwd=tmp_path, env={**slurm.environment, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    job = done.stdout.strip()
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 120)
    console = (tmp_path / f"slurm-{job}.out").read_text()
    assert slurm.state(job) == "COMPLETED", console
    assert len(losses(tmp_path / name / "run")) == 6
    assert len(list((tmp_path / name / "run/logs").glob("attempt-1/torchrun-*.log"))) == 2
    assert len(list((tmp_path / name / "run/logs").glob("attempt-1/rank-*.log"))) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, f"slurm-{job}.out"])


@pytest.mark.whole  # a preempted job gets the same signal
def test_a_job_that_gets_a_stop_signal_saves_and_is_queued_again(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    job = submit(slurm, tmp_path, "cluster.nodes=2", "run_dir=far", *LONG)
    far = tmp_path / "far"
    slurm.until(lambda: (far / "metrics.jsonl").is_file() and len(losses(far)) > 20, 120)
    slurm.ask("scancel", "--signal=USR2", job)
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 180)
    assert slurm.state(job) == "COMPLETED", out_of(far)
    statuses = [json.loads(p.read_text()) for p in sorted(far.glob("logs/attempt-*/status.json"))]
    assert [each["state"] for each in statuses] == ["stopped", "finished"]
    assert statuses[0]["reason"] == "SIGUSR2"
    done = shardway("train", "cluster.nproc_per_node=2", "run_dir=near", *LONG, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(far) == losses(tmp_path / "near"), "to the bit"


@pytest.mark.whole  # five minutes: the shortest time limit is one minute
@pytest.mark.timeout(900)
def test_a_job_resumes_after_each_time_limit_until_it_finishes(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    words = (*LONG, "training.max_steps=1200", "cluster.time=1:00", "cluster.signal_seconds=15")
    job = submit(slurm, tmp_path, "run_dir=far", *words)
    far = tmp_path / "far"
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "TIMEOUT"), 600)
    assert slurm.state(job) == "COMPLETED", out_of(far)
    statuses = [json.loads(p.read_text()) for p in sorted(far.glob("logs/attempt-*/status.json"))]
    assert len(statuses) > 2, statuses
    assert {each["reason"] for each in statuses} <= {"SIGUSR2", "time limit", None}
    done = shardway("train", "cluster.nproc_per_node=1", "run_dir=near", *words[:-2], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(far) == losses(tmp_path / "near"), "to the bit"


def test_a_job_that_a_user_stops_stays_stopped(slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "run_dir=far", *LONG, "training.max_steps=100000")
    far = tmp_path / "far"
    slurm.until(lambda: (far / "metrics.jsonl").is_file() and len(losses(far)) > 3, 120)
    (far / "stop").touch()
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 60)
    status = json.loads((far / "logs/attempt-1/status.json").read_text())
    assert (status["state"], slurm.state(job)) == ("stopped", "COMPLETED")
    assert len(list(far.glob("logs/attempt-*"))) == 1


def test_a_job_that_could_never_start_is_refused_with_slurm_s_reason(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*SHARDWAY, "train", "cluster=slurm", "cluster.nodes=8", "model=tiny", "run_dir=far"],
        cwd=tmp_path, env=slurm.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Slurm refused the command" in done.stderr
    assert not (tmp_path / "far").exists()


def test_a_run_is_managed_from_the_login_node(slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "run_dir=runs/far", *LONG, "training.max_steps=5000")
    far = tmp_path / "runs/far"
    slurm.until(lambda: (far / "metrics.jsonl").is_file() and len(losses(far)) > 30, 120)
    table = verb(slurm, tmp_path, "runs").stdout.splitlines()
    row = dict(zip(table[0].split(), table[1].split(), strict=True))
    assert (row["run"], row["state"], row["attempt"], row["job"]) == ("far", "running", "1", job)
    assert row["step"].endswith("/5000")
    assert int(row["step"].partition("/")[0]) > 30
    assert re.fullmatch(r"\d+:\d\d:\d\d", row["left"])
    refused = verb(slurm, tmp_path, "resume", "runs/far")
    assert refused.returncode == 2
    assert "stop it first" in refused.stderr
    joined = verb(slurm, tmp_path, "train", "model=tiny", "run_dir=runs/far", "resume=auto")
    assert (joined.returncode, joined.stderr.strip()) == (
        2, f"{far} is job {job} already; stop it first: shardway stop {far}",
    )  # fmt: skip
    assert verb(slurm, tmp_path, "stop", "runs/far").returncode == 0
    followed = verb(slurm, tmp_path, "logs", "runs/far", "--follow")
    assert "stopped after step" in followed.stdout
    slurm.until(lambda: slurm.state(job) == "COMPLETED", 60)
    assert verb(slurm, tmp_path, "runs").stdout.splitlines()[1].split()[1] == "stopped"
    assert "data: " in verb(slurm, tmp_path, "logs", "runs/far").stdout
    assert verb(slurm, tmp_path, "logs", "runs/far", "--rank", "0").returncode == 0
    assert (
        "there are logs of ranks 0"
        in verb(slurm, tmp_path, "logs", "runs/far", "--rank", "7").stderr
    )
    again = verb(slurm, tmp_path, "resume", "runs/far")
    assert again.returncode == 0, again.stderr
    newer = re.search(r"job (\d+) is in the queue", again.stdout)[1]
    before = len(losses(far))
    slurm.until(lambda: len(losses(far)) > before, 60)
    assert verb(slurm, tmp_path, "stop", "runs/far").returncode == 0
    slurm.until(lambda: slurm.state(newer) == "COMPLETED", 120)
    steps = [json.loads(p.read_text())["step"] for p in sorted(far.glob("logs/*/status.json"))]
    assert steps[1] > steps[0] > 30
