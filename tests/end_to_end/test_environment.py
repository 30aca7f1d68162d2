"""What other launchers left in the environment of `shardway train`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import REFUSED
from launcher.run.started_by import RANK_VARIABLES
from tests.helpers.commands import (
    SHARDWAY,
    SHORT,
    TRAIN_TINY,
    in_process,
    losses,
    run,
    shardway,
    written,
)

OF_ANOTHER_LAUNCH = {
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "3",
    "PET_NO_PYTHON": "1",
    "PET_RDZV_ENDPOINT": "nowhere:1",
    "RANK": "3",
    "WORLD_SIZE": "9",
    "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "5",
    "SHARDWAY_NODES": "2",
    "SHARDWAY_RENDEZVOUS": "/nowhere",
    "SLURM_PROCID": "0",  # of a batch script, or of srun --pty
}


@pytest.mark.slow
def test_a_local_run_does_not_see_variables_of_another_launch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OF_ANOTHER_LAUNCH.items():
        monkeypatch.setenv(name, value)
    done = shardway(*TRAIN_TINY, *SHORT, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 4
    assert (tmp_path / "run/logs/attempt-1/rank-01.log").is_file()
    assert not (tmp_path / "run/logs/attempt-1/rank-02.log").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SLURM_PROCID", "2", ["SLURM_PROCID=2", "srun --ntasks=1", "unset SLURM_PROCID"]),
        ("TORCHELASTIC_RUN_ID", "none", ["not RANK, LOCAL_RANK", "unset TORCHELASTIC_RUN_ID"]),
    ],
)
def test_a_process_of_another_launcher_starts_no_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, value: str, words: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    assert in_process(monkeypatch, *TRAIN_TINY, *SHORT, "run_dir=run") == REFUSED
    said = capsys.readouterr().err
    assert all(part in said for part in words), said
    assert written(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [("train", *TRAIN_TINY[1:], *SHORT), ("resume", "run")])
def test_all_variables_of_torchrun_make_no_rank(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """As in a shell of a rank, or from a profile. No store is waited for."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    session = ["bash", "-c", 'setsid --wait "$@"; exit $?', "bash"]
    cwd = tmp_path if words[0] == "train" else finished.parent
    before = written(cwd)
    done = run([*session, *SHARDWAY, *words], cwd)
    assert done.returncode == REFUSED
    assert "which started this session, is not torchrun: it is left over" in done.stderr
    assert "env -u TORCHELASTIC_RUN_ID shardway" in done.stderr
    assert written(cwd) == before
