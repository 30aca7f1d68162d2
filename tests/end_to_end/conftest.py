"""Fixtures that the end-to-end suites share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import SHORT, shardway


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with evaluations and intermediate checkpoints."""
    cwd, scratch = (tmp_path_factory.mktemp(name) for name in ("finished", "scratch"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        done = shardway(
            *("train", "model=tiny", "cluster.cpu_processes=2", *SHORT, "run_dir=run"),
            *("data.eval_rows=5", "training.eval_steps=2", "checkpoint.save_steps=3"),
            cwd=cwd,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4/4" in done.stdout
    assert "tokens/s" in done.stdout
    assert {path.name.split("_")[0] for path in scratch.iterdir()} <= {"torchinductor"}
    return cwd / "run"
