"""The commands refuse a hostile run folder whose checksums are right."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.folders.checkpoint import Checkpoint
from tests.helpers import hostile
from tests.helpers.commands import shardway
from tests.helpers.released import make_manifest_anew, moved

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A run of full training, and its checkpoint of step 5."""
    return moved("full-fsdp-fp32", tmp_path, tiny)


def test_train_does_not_execute_the_metadata_of_the_checkpoint_it_resumes(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    marker, checkpoint = tmp_path / "marker", Checkpoint(run / "checkpoints/step-000005")
    data = hostile.pickles(marker)["reduce, protocol 4"]
    (checkpoint.path / "model/.metadata").write_bytes(data)
    make_manifest_anew(checkpoint)
    rows = f"data.path={tmp_path / 'rows.jsonl'}"
    words = ["train", "model=tiny", "method=full", rows, f"resume={checkpoint.path}", "run_dir=new"]
    asked = shardway(*words, cwd=tmp_path).stderr  # with which settings it was trained
    words += shlex.split(asked.rpartition("→ ")[2].partition(", or ")[0])
    done = shardway(*words, cwd=tmp_path)
    assert not marker.exists()
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "model/.metadata names posix.system, which no checkpoint needs" in said
    assert "Traceback" not in said


def test_resume_does_not_execute_a_part_of_the_optimizer(run: Path, tmp_path: Path) -> None:
    marker, checkpoint = tmp_path / "marker", Checkpoint(run / "checkpoints/step-000005")
    data = hostile.pickles(marker)["exec"]
    for file in (checkpoint.path / "optimizer").glob("*.distcp"):
        size = file.stat().st_size
        hostile.write_archive(file, data)
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    make_manifest_anew(checkpoint)
    done = shardway("resume", run, cwd=tmp_path)
    assert not marker.exists()
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert ".distcp" in said
    assert "Traceback" not in said
