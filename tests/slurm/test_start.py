"""How a job starts: what a node's agent has, what reaches it, and jobs that make no attempt."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster.slurm import script_path
from launcher.config.overrides import quote
from tests.helpers.commands import losses
from tests.helpers.slurm import LONG, Slurm, out_of, submit, verb

OVER = ("COMPLETED", "FAILED")
NO_ATTEMPT = "ended before it began"
# What a surrounding job and a user's own defaults would change.
LEAKED = {
    "SLURM_JOB_ID": "999",
    "SLURM_RESTART_COUNT": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_NTASKS": "6",
    "SLURM_NTASKS_PER_NODE": "6",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_GPUS_PER_TASK": "5",
    "SLURM_MEM_PER_CPU": "1",
    "SLURM_MEM_PER_NODE": "2",
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_STATES": "PENDING",
    "SBATCH_ARRAY_INX": "0-3",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_OPEN_MODE": "truncate",
    "SBATCH_NO_REQUEUE": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "PET_NNODES": "5",
}


@pytest.mark.parametrize(
    ("flags", "nodes", "cpus"),
    [
        (["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--gpus-per-task=1"], 2, "4"),
        (["--nodes=1", "--ntasks-per-node=2", "--gpus=2", "--gpu-bind=single:1"], 1, "2"),
    ],
    ids=["a task for each GPU", "two tasks"],
)
def test_the_agent_of_a_node_has_all_that_the_job_has_there(
    slurm: Slurm, tiny: Path, tmp_path: Path, flags: list[str], nodes: int, cpus: str
) -> None:
    """In place of the agent's Python, a script that writes its environment."""
    probe = tmp_path / "probe"
    probe.write_text(f"#!/bin/sh\nenv > {tmp_path}/agent-$SLURM_PROCID\n")
    probe.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    variables = {"PATH": path, "SHARDWAY_RANK_PYTHON": str(probe), "SLURM_NTASKS_PER_NODE": "5"}
    words = ("model=tiny", "run_dir=run", "training.global_batch_size=8")
    done = subprocess.run(
        ["sbatch", "--parsable", *flags, str(script_path()), *words],
        cwd=tmp_path, env={**slurm.environment, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    slurm.until(lambda: slurm.state(done.stdout.strip()) in OVER, 120)
    agents = sorted(tmp_path.glob("agent-*"))
    console = (tmp_path / f"slurm-{done.stdout.strip()}.out").read_text()
    assert [agent.name for agent in agents] == [f"agent-{at}" for at in range(nodes)], console
    for agent in agents:
        environment = dict(re.findall(r"^(\w+)=(.*)$", agent.read_text(), re.MULTILINE))
        assert environment["SLURM_CPUS_ON_NODE"] == cpus
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_job_that_ends_before_its_attempt_says_why(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    """In a folder whose name Slurm would expand in the name of the log."""
    name = '50%j of "it\'s" %% a b'
    (tmp_path / name).mkdir()
    setup = 'cluster.setup=["module load no-such-module"]'
    job = submit(slurm, tmp_path, f"run_dir={quote(f'{name}/far')}", setup, *LONG)
    far = tmp_path / name / "far"
    slurm.until(lambda: slurm.state(job) in OVER, 60)
    assert slurm.state(job) == "FAILED"
    table = verb(slurm, tmp_path, "runs", name).stdout
    assert NO_ATTEMPT in table
    assert f"{name}/far/logs/slurm-{job}.out" in table
    said = verb(slurm, tmp_path, "logs", str(far)).stdout
    assert "module: command not found" in said
    assert "the job ended before its attempt began, with status 127" in said
    assert not (far / "logs/attempt-1").exists()


def test_secrets_reach_every_start_of_a_job_and_are_never_written(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    """Submitted from inside another job. The second start finds no marker, so it makes no
    attempt."""
    seen, marker = tmp_path / "seen", tmp_path / "marker"
    marker.touch()
    lines = (f'echo "$MY_TOKEN $LICENSE" >> {seen}', f"test -e {marker}")
    setup = ",".join(f"'{line}'" for line in lines)
    words = (
        "cluster.environment.MY_TOKEN=xyz-typed", "cluster.secrets=[LICENSE]",
        f"cluster.setup=[{setup}]", "training.max_steps=100000", "run_dir=runs/far",
    )  # fmt: skip
    variables = {**LEAKED, "LICENSE": "xyz-inherited"}
    job = submit(slurm, tmp_path, *LONG, *words, variables=variables)
    far = tmp_path / "runs/far"
    slurm.until(lambda: (far / "metrics.jsonl").is_file() and len(losses(far)) > 3, 120)
    marker.unlink()
    slurm.ask("scancel", "--signal=USR2", job)
    slurm.until(lambda: slurm.state(job) in OVER, 120)
    assert slurm.state(job) == "FAILED", out_of(far)
    assert seen.read_text() == "xyz-typed xyz-inherited\n" * 2
    assert [path.name for path in far.glob("logs/attempt-*")] == ["attempt-1"]
    assert json.loads((far / "logs/attempt-1/status.json").read_text())["state"] == "stopped"
    assert NO_ATTEMPT in verb(slurm, tmp_path, "runs").stdout
    assert len(list(far.glob("checkpoints/step-*"))) >= 1
    written = [path for path in far.rglob("*") if path.is_file()]
    assert [path for path in written if b"xyz-" in path.read_bytes()] == []
    assert "MY_TOKEN: •••" in (far / "config.yaml").read_text()
    for private in ("config.yaml", "launch.json", "setup.sh"):
        assert (far / private).stat().st_mode & 0o777 == 0o600, private
    refused = verb(slurm, tmp_path, "resume", "runs/far")
    assert refused.returncode == 2
    assert "LICENSE, MY_TOKEN must be set in the environment" in refused.stderr
