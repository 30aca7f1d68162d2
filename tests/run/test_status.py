"""The state of a run is read from its folder, even if files in it are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config import store
from launcher.errors import UserError
from launcher.folders.json_file import DamagedFile
from launcher.folders.run import RunDir
from launcher.run.status import run_state, slurm_job_id, total_steps


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir(parents=True)
    return run


def test_status_job_and_steps_are_read_from_their_files(run: RunDir) -> None:
    run.status.write_text('{"state": "stopped"}')
    run.submitted.write_text('{"job": "17_2"}')
    run.steps.write_text('{"total_steps": 40}')
    assert run_state(run, None) == "stopped"
    assert slurm_job_id(run) == "17_2"
    assert total_steps(run, 7) == 40


def test_a_configuration_that_is_not_utf_8_is_refused_by_its_name(run: RunDir) -> None:
    run.config.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"config\.yaml is not a frozen configuration"):
        store.load(run.config)


@pytest.mark.parametrize("job", ["", "x" * 300, "/../../../etc/hosts", "7_", "7\n", -7, 7.5, "\0"])
def test_what_is_not_the_number_of_a_job_is_damage(run: RunDir, job: object) -> None:
    run.submitted.write_text(json.dumps({"job": job}))
    with pytest.raises(DamagedFile, match=r"slurm\.json is damaged: job is .* the number of a job"):
        slurm_job_id(run)
    assert run_state(run, None) == "failed"


@pytest.mark.parametrize("state", ["", " ", "x\x1b[2J", "x\\ud800"])
def test_a_state_that_cannot_be_printed_is_damage(run: RunDir, state: str) -> None:
    run.status.parent.mkdir(parents=True, exist_ok=True)
    run.status.write_text('{"state": "' + state.replace("\x1b", "\\u001b") + '"}')
    with pytest.raises(DamagedFile, match=r"status\.json is damaged: its state is"):
        run_state(run, None)
