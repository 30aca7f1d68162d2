"""What happens to a job after its ranks have ended, with a fake scontrol on PATH."""

from __future__ import annotations

import contextlib
import io
import json
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import job
from launcher.folders.run import RunDir
from launcher.run import create, sweep
from launcher.run.outcome import write_hung
from launcher.run.status import run_state
from tests.helpers.compose import composed

FACTS = "JobId=7 {array}JobName={name} UserId=me(1) Restarts={restarts} Comment={name} WorkDir=/a"


class Job:
    """A job with several successive attempts in a run folder."""

    def __init__(self, folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.path, self.monkeypatch = folder, path, monkeypatch
        config = composed("cluster=slurm", "cluster.nodes=2", "cluster.requeue_limit=5")
        path.mkdir(parents=True)
        (path / "logs").mkdir()
        (path / "checkpoints").mkdir()
        create.freeze_config(RunDir(path), config)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "99")  # leaked by another job: not read
        self.says()

    def says(self, restarts: int = 0, array: str = "", name: str = "x") -> None:
        """Set what scontrol reports for the job."""
        line = FACTS.format(restarts=restarts, array=array, name=name)
        other = line.replace("JobId=7", "JobId=70")
        script = self.folder / "bin/scontrol"
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f'#!/bin/bash\n[ "$1" = requeue ] && echo "$2" >> {self.folder}/requeued && exit\n'
            f"echo '{other}'\necho '{line}'\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        job._job_fields.cache_clear()

    def attempt(self, state: str | None, reason: str | None = None, at: int = 0) -> RunDir:
        """Add an attempt that started at the checkpoint of step `at` and ended in this state."""
        run = RunDir(self.path, RunDir(self.path).newest_attempt().attempt + 1)
        run.logs.mkdir()
        run.job.write_text(json.dumps({"job": "7", "step": at}))
        if state:
            run.status.write_text(json.dumps({"state": state, "reason": reason, "step": 9}))
        return run

    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().split() if file.is_file() else []


@pytest.fixture
def a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    def make(path: str = "run") -> Job:
        return Job(tmp_path, tmp_path / path, monkeypatch)

    return make


@pytest.mark.parametrize("reason", ["SIGUSR2", "SIGTERM", "time limit"])
def test_a_job_that_slurm_stopped_is_requeued(a_job: Any, reason: str) -> None:
    made = a_job()
    assert job.end_attempt(made.attempt("stopped", reason)) == 0
    assert made.requeued() == ["7"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [("finished", None), ("stopped", "shardway stop"), ("stopped", "training.stop_after_steps=3")],
)
def test_a_finished_or_stopped_job_is_not_requeued(
    a_job: Any, state: str, reason: str | None
) -> None:
    made = a_job()
    assert job.end_attempt(made.attempt(state, reason)) == 0
    assert made.requeued() == []


def test_a_user_stop_during_a_signal_prevents_the_requeue(a_job: Any) -> None:
    made = a_job()
    run = made.attempt("stopped", "SIGUSR2")
    run.stop.write_text("shardway stop")
    assert job.end_attempt(run) == 0
    assert made.requeued() == []
    assert not run.stop.exists()
    run.stop.write_text("SIGUSR2")  # written by a rank that received the signal late
    assert job.end_attempt(run) == 0
    assert made.requeued() == ["7"]


def test_the_requeue_limit_is_respected(a_job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = a_job()
    made.says(restarts=5, name="a Restarts=0 ArrayTaskId=3")
    assert job.end_attempt(made.attempt("stopped", "SIGUSR2")) == 75
    assert "cluster.requeue_limit=5 is reached" in capsys.readouterr().err
    assert made.requeued() == []


def test_three_attempts_without_progress_end_the_job(
    a_job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = a_job()
    for number in range(2):
        assert job.end_attempt(made.attempt("stopped", "SIGUSR2")) == 0
        assert len(made.requeued()) == number + 1
    assert job.end_attempt(made.attempt("stopped", "SIGUSR2")) == 75
    assert "3 attempts in a row got no further than step 0" in capsys.readouterr().err


def test_a_lost_node_is_requeued_and_not_a_failure(a_job: Any) -> None:
    made = a_job()
    run = made.attempt(None)
    error = {"rank": 0, "exit_code": 1, "message": "closed by peer", "time": 1, "lost_peer": True}
    run.rank_error(0).write_text(json.dumps(error))
    assert job.end_attempt(run) == 0
    assert made.requeued() == ["7"]
    run.rank_error(1).write_text(json.dumps({**error, "rank": 1, "lost_peer": False}))
    assert job.end_attempt(run) == 1, "the other rank has a cause of its own"
    assert made.requeued() == ["7"]


def test_a_failure_is_followed_by_another_attempt_in_the_job_as_often_as_it_may(
    a_job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = a_job()
    create.freeze_config(RunDir(made.path), composed("cluster=slurm", "cluster.max_restarts=2"))
    error = {"rank": 1, "exit_code": 3, "message": "m", "time": 1, "lost_peer": False}
    statuses = []
    for step in (5, 7, 9):
        run = made.attempt(None)
        run.rank_error(1).write_text(json.dumps({**error, "kind": "error", "step": step}))
        statuses.append(job.end_attempt(run))
    assert statuses == [job.GO_ON, job.GO_ON, 3]
    assert "not restarted: cluster.max_restarts=2 is reached" in capsys.readouterr().err
    made.says(restarts=1)  # requeued since: the failures of an earlier start do not count
    run = made.attempt(None)
    run.job.write_text(json.dumps({"job": "7", "step": 0, "restarts": 1}))
    run.rank_error(1).write_text(json.dumps({**error, "kind": "error", "step": 9}))
    run.stop.write_text("shardway stop")
    assert job.end_attempt(run) == 3, "a person has stopped it"
    assert job.end_attempt(run) == job.GO_ON
    assert made.requeued() == []


def test_a_hung_attempt_is_followed_by_another_one_unless_a_person_has_stopped_it(
    a_job: Any,
) -> None:
    made = a_job()
    create.freeze_config(RunDir(made.path), composed("cluster=slurm", "cluster.max_restarts=2"))
    run = made.attempt(None)
    write_hung(run, "rank 1 stood still")
    assert job.end_attempt(run) == job.GO_ON
    run = made.attempt(None)
    run.stop.write_text("shardway stop")
    write_hung(run, "rank 1 stood still")
    assert job.end_attempt(run) == 76
    assert made.requeued() == []


@pytest.mark.parametrize("reports", [0, 1])
def test_a_node_that_could_not_begin_is_no_lost_node(a_job: Any, reports: int) -> None:
    """It has no agent's log. The other node's ranks may have reported that they lost a rank."""
    made = a_job()
    run = made.attempt(None)
    run.agent_log(0).touch()
    error = {"rank": 0, "exit_code": 1, "message": "closed by peer", "time": 1, "lost_peer": True}
    for rank in range(reports):
        run.rank_error(rank).write_text(json.dumps(error))
    assert job.end_attempt(run) == 69
    run.rank_error(0).write_text(json.dumps({**error, "exit_code": 2, "lost_peer": False}))
    assert job.end_attempt(run) == 2, "it has failed for another reason"
    assert made.requeued() == []


def test_an_older_attempt_does_not_requeue(a_job: Any) -> None:
    made = a_job()
    old = made.attempt("stopped", "SIGUSR2")
    made.attempt(None)
    assert job.end_attempt(old) == 1
    assert made.requeued() == []


def test_an_array_task_is_requeued_by_index_and_a_failing_table_is_only_reported(
    a_job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table fails because squeue is missing."""
    made = a_job("rates/2")
    made.says(array="ArrayJobId=7 ArrayTaskId=2 ")
    (made.path.parent / sweep.INDEX).write_text("{}")
    assert job.end_attempt(made.attempt("stopped", "SIGUSR2")) == 0
    assert made.requeued() == ["7_2"]
    assert sweep.run_of_task(made.path.parent, "2").path == made.path


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"state": 3}', '{"reason": null}', '{"state": "stopped"}']
)
def test_a_damaged_status_ends_the_job(a_job: Any, damage: str) -> None:
    made = a_job()
    run = made.attempt("stopped", "SIGUSR2")
    run.status.write_text(damage)
    assert_refused(made, run, "status.json")


@pytest.mark.parametrize("damage", ["", "[1]", "{}", '{"step": null}', '{"step": "4"}'])
def test_a_damaged_record_of_an_attempt_ends_the_job(a_job: Any, damage: str) -> None:
    made = a_job()
    made.attempt("stopped", "SIGUSR2").job.write_text(damage)
    assert_refused(made, made.attempt("stopped", "SIGUSR2"), "attempt-1/job.json")


def assert_refused(made: Job, run: RunDir, file: str) -> None:
    """The job ends with a sentence, and is not queued again."""
    made.monkeypatch.setattr("sys.argv", ["job", "end", str(run.logs)])
    said = io.StringIO()
    with pytest.raises(SystemExit) as ended, redirect_stderr(said):
        job.main()
    assert ended.value.code == 2
    assert file in said.getvalue()
    assert "Traceback" not in said.getvalue()
    assert made.requeued() == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine lets no test mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_job_has_made_no_attempt(
    a_job: Any, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = a_job("disk/run")
    run = RunDir(made.path)
    run.starting.touch()  # by the batch script
    with contextlib.suppress(OSError), (full_disk / "rest").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    made.monkeypatch.setattr("sys.argv", ["job", "begin", "--run", str(made.path)])
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert ended.value.code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert run_state(run.newest_attempt(), None) == "ended before it began"
