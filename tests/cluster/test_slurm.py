"""What is passed to Slurm, with fake commands on PATH; tests/slurm uses the real one."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster import slurm
from launcher.config.schema.cluster import SlurmConfig
from launcher.errors import UserError
from tests.helpers.commands import SHARDWAY, in_process, written

HOSTILE = """a b,"c" 'd' $(touch hit) `touch hit`; é \\ =x"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """Fake sbatch, squeue and scancel that record their arguments."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, answer in (
        ("sbatch", "7;cluster"),
        ("squeue", "7|PENDING|(Priority)"),
        ("scancel", ""),
    ):
        script = bin_folder / name
        script.write_text(
            f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" >> {tmp_path}/calls\n"
            f"printf '\\n' >> {tmp_path}/calls\nenv > {tmp_path}/environment\necho '{answer}'\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}


def calls(folder: Path) -> list[list[str]]:
    lines = (folder / "calls").read_text().split("\0\n")
    return [line.split("\0") for line in lines if line]


def train(cwd: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SHARDWAY, "train", "cluster=slurm", "model=tiny", *words],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_every_option_is_one_argument_of_sbatch() -> None:
    cluster = SlurmConfig(
        name="slurm", nodes=4, gpus_per_node=8, gpu_type="h100", partition="p", account="a",
        time="4:00:00", cpus_per_task=96, mem="0", exclusive=True, dependency="afterok:1",
        comment=HOSTILE, extra_flags=["--switches=1"], signal_seconds=300,
    )  # fmt: skip
    assert slurm.sbatch_command(cluster, Path("/runs/a b")) == [
        "sbatch", "--job-name=shardway", "--nodes=4", "--partition=p", "--account=a",
        "--time=4:00:00", "--mem=0", "--dependency=afterok:1", f"--comment={HOSTILE}",
        "--gpus-per-node=h100:8", "--cpus-per-task=96", "--signal=USR2@300",
        "--kill-on-invalid-dep=yes", "--exclusive", "--switches=1",
        "--output=/runs/a b/logs/slurm-%j.out", "--chdir=/runs/a b",
        "/runs/a b/train.sbatch", "--run", "/runs/a b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "kind", "word"),
    [
        ("gpus-per-node", None, "--gpus-per-node=8"),
        ("gres", None, "--gres=gpu:8"),
        ("gres", "h100", "--gres=gpu:h100:8"),
    ],
)
def test_gpus_are_requested_with_the_configured_flag(
    flag: str, kind: str | None, word: str
) -> None:
    cluster = SlurmConfig(name="slurm", gpus_per_node=8, gpu_type=kind, gpu_flag=flag)
    assert word in slurm.sbatch_flags(cluster)


def test_a_sweep_is_one_array_with_a_log_in_each_run() -> None:
    cluster = SlurmConfig(name="slurm", array_limit=2)
    words = slurm.sbatch_command(cluster, Path("/runs/a b"), 3)
    assert "--array=0-2%2" in words
    assert "--output=/runs/a b/%a/logs/slurm-%A_%a.out" in words
    assert words[-3:] == ["/runs/a b/train.sbatch", "--run", "/runs/a b"]


def test_the_setup_script_is_plain_bash() -> None:
    cluster = SlurmConfig(
        name="slurm", environment={"NCCL_DEBUG": "INFO", "LIST": "a,b c"},
        setup=["module load cuda", 'source "$HOME/venv/bin/activate"'],
        container=["apptainer", "exec", "--nv", "my image.sif"], container_python="python3",
    )  # fmt: skip
    assert slurm.setup_script(cluster) == (
        f"export SHARDWAY_PYTHON={sys.executable}\n"
        "export NCCL_DEBUG=INFO\n"
        "export LIST='a,b c'\n"
        "module load cuda\n"
        'source "$HOME/venv/bin/activate"\n'
        "export SHARDWAY_RANK_PYTHON=python3\n"
        "container=(apptainer exec --nv 'my image.sif')\n"
    )


def test_setup_quotes_values_so_that_they_are_not_executed(tmp_path: Path) -> None:
    cluster = SlurmConfig(
        name="slurm", environment={"HARD": HOSTILE}, setup=["export SOFT=1"],
        container=["apptainer", "exec", "a b.sif"], container_python="/opt/a b/python",
    )  # fmt: skip
    words = '"$HARD" "$SOFT" "${#container[@]}" "${container[2]}" "$SHARDWAY_RANK_PYTHON"'
    show = f'printf "%s\\n" {words}'
    done = subprocess.run(
        ["bash", "-euc", f"{slurm.setup_script(cluster)}\n{show}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [HOSTILE, "1", "3", "a b.sif", "/opt/a b/python"]
    assert written(tmp_path) == []


def test_a_run_is_tested_then_frozen_then_queued(
    tiny: Path, tmp_path: Path, fake: dict[str, str]
) -> None:
    run = tmp_path / "my run"
    done = train(tmp_path, fake, f"run_dir={run}", "cluster.comment=two words")
    assert done.returncode == 0, done.stderr
    assert "job 7 is in the queue" in done.stdout
    first, second = calls(tmp_path)
    assert first[:2] == ["sbatch", "--test-only"]
    assert second[:2] == ["sbatch", "--parsable"]
    assert "--comment=two words" in second
    assert second[-3:] == [str(run / "train.sbatch"), "--run", str(run)]
    assert json.loads((run / "slurm.json").read_text())["job"] == "7"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "slurm.json", "setup.sh", "train.sbatch", "logs", "checkpoints",
    }  # fmt: skip
    stopped = subprocess.run(
        [*SHARDWAY, "stop", str(run)], env=fake, cwd=tmp_path, capture_output=True, text=True
    )
    assert stopped.stdout == "job 7 was removed from the queue\n"
    assert calls(tmp_path)[-1] == ["scancel", "--state=PENDING", "7"]


def test_a_dry_run_prints_script_and_command_and_writes_nothing(
    tiny: Path, tmp_path: Path, fake: dict[str, str]
) -> None:
    done = train(tmp_path, fake, "launch.dry_run=true", "cluster.nodes=2", "run_dir=here")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --requeue" in done.stdout
    assert "sbatch --job-name=shardway --nodes=2" in done.stdout
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "here").exists()


def test_missing_slurm_is_reported(tiny: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = train(tmp_path, {**os.environ, "PATH": str(empty)}, "run_dir=here")
    assert done.returncode == 2
    assert "there is no sbatch on this machine" in done.stderr
    assert not (tmp_path / "here").exists()


def test_the_script_passes_shellcheck() -> None:
    subprocess.run(["bash", "-n", str(slurm.script_path())], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck; apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(slurm.script_path())], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_memory_is_requested_per_node_cpu_or_gpu() -> None:
    for setting in ("mem", "mem_per_cpu", "mem_per_gpu"):
        flags = slurm.sbatch_flags(SlurmConfig(name="slurm", **{setting: "4G"}))
        assert [flag for flag in flags if flag.startswith("--mem")] == [
            f"--{setting.replace('_', '-')}=4G"
        ]


def test_a_percent_sign_in_a_folder_is_none_of_slurm_s() -> None:
    words = slurm.sbatch_command(SlurmConfig(name="slurm"), Path("/runs/50%j %% a"))
    assert "--output=/runs/50%%j %%%% a/logs/slurm-%j.out" in words
    assert "--chdir=/runs/50%j %% a" in words


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\tb"])
def test_a_folder_in_which_slurm_writes_no_log_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="Slurm could not write the job's log there"):
        slurm.sbatch_command(SlurmConfig(name="slurm"), Path("/runs", name))


@pytest.mark.parametrize("sweep", [[], ["--multirun", "training.seed=1,2"]], ids=["run", "sweep"])
def test_secrets_reach_sbatch_by_its_environment_only(
    tiny: Path, tmp_path: Path, fake: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], sweep: list[str],
) -> None:  # fmt: skip
    here(monkeypatch, tmp_path, fake)
    leaked = {"SLURM_NTASKS": "4", "SBATCH_EXPORT": "NONE", "SQUEUE_USERS": "x"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "ours", "LICENSE": "xyz-inherited"}
    for key, value in {**leaked, **kept}.items():
        monkeypatch.setenv(key, value)
    words = ("cluster.environment={MY_TOKEN: xyz-typed, A: b}", "cluster.secrets=[LICENSE]")
    command = ("train", "cluster=slurm", "model=tiny", *words, *sweep)
    assert in_process(monkeypatch, *command, "launch.dry_run=true") == 0
    assert in_process(monkeypatch, *command, "run_dir=run") == 0
    assert "xyz-" not in "".join(capsys.readouterr())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if "xyz-" in path.read_text()] == []
    assert "export A=b" in (tmp_path / "run/setup.sh").read_text()
    assert "MY_TOKEN" not in (tmp_path / "run/setup.sh").read_text()
    for path in files:
        if path.name in ("setup.sh", "sweep.json", "config.yaml"):
            assert path.stat().st_mode & 0o777 == 0o600, path
    lines = (tmp_path / "environment").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert environment["MY_TOKEN"] == "xyz-typed"
    assert kept.items() <= environment.items()
    assert not leaked.keys() & environment.keys()


def test_a_missing_secret_and_a_bad_folder_are_named_before_anything_is_written(
    tiny: Path, tmp_path: Path, fake: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here(monkeypatch, tmp_path, fake)
    words = ("train", "cluster=slurm", "model=tiny", "cluster.secrets=[LICENSE]")
    assert in_process(monkeypatch, *words, "run_dir=run") == 2
    assert "LICENSE must be set in the environment" in capsys.readouterr().err
    assert in_process(monkeypatch, *words, r"run_dir='a\b'") == 2
    assert "Slurm could not write the job's log there" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


def here(monkeypatch: pytest.MonkeyPatch, folder: Path, environment: dict[str, str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.setattr("launcher.train.check_first_rows", lambda config: None)  # it loads torch
