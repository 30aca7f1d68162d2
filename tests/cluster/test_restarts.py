"""When a run that failed is started again, and when that is over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster import restarts
from launcher.cluster.local import Failure
from launcher.cluster.restarts import Failed
from launcher.config import store
from launcher.folders.run import RunDir
from launcher.run import create, processes
from launcher.run.outcome import Outcome, write_hung, write_status
from tests.helpers.compose import composed_raw


def failed(kind: str, *steps: int | None) -> list[Failed]:
    """Attempts that failed in these steps."""
    return [
        Failed(number, Failure(1, 1, "why", kind, step, (3, 8)), 2)
        for number, step in enumerate(steps, start=1)
    ]


@pytest.mark.parametrize("kind", ["killed", "error", "step", "refused"])
def test_a_step_that_fails_three_times_ends_the_run_with_a_report(kind: str) -> None:
    assert restarts.reason_not_to_restart(failed(kind, 7), 9) is None
    assert restarts.reason_not_to_restart(failed(kind, 7, 7), 9) is None
    assert restarts.reason_not_to_restart(failed(kind, 7, 7, 8), 9) is None
    assert restarts.reason_not_to_restart(failed(kind, 7, 8, 7), 9) is None
    said = restarts.reason_not_to_restart(failed(kind, 5, 7, 7, 7), 9)
    assert said is not None
    assert "step 7 has failed 3 times (attempts 2, 3, 4)" in said
    assert "error: why" in said
    assert "Rows of step 7: 3, 8" in said
    assert "to try: " in said


@pytest.mark.parametrize(
    ("attempts", "said"),
    [
        (failed("refused", None), "before its first step"),
        (failed("error", None), "before its first step"),
        (failed("memory", None), "before its first step"),
        (failed("spike", 7), "training.on_spike"),
        (failed("memory", 7, 7), "step 7 has run out of memory again"),
        (failed("killed", 5, 7, 9), "cluster.max_restarts=2 is reached"),
        (failed("killed", None), None),
        (failed("memory", 7), None),
        (failed("memory", 5, 7), None),
    ],
)
def test_what_would_fail_again_is_not_restarted(attempts: list[Failed], said: str | None) -> None:
    why_not = restarts.reason_not_to_restart(attempts, 2)
    assert (why_not is None) if said is None else (said in (why_not or ""))


@pytest.mark.parametrize("end", ["stop", "status", "success", "restart", "hung", "hung-stop"])
def test_only_a_failure_is_followed_by_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The ranks of each attempt lose one of them, and only then something else happens."""
    monkeypatch.chdir(tmp_path)
    config = store.build(composed_raw(cluster={"max_restarts": 1}))
    run, frozen = create.start_attempt(config, ["train"], 2)
    started: list[int] = []

    def start(attempt: RunDir) -> int:
        started.append(attempt.attempt)
        assert processes.living(attempt), "the run is seen between two attempts, too"
        if end == "stop":
            attempt.stop.touch()
        elif end == "hung-stop":  # it hangs while it stops
            attempt.stop.touch()
            write_hung(attempt, "rank 1 stood still")
        elif end == "status":
            write_status(attempt, Outcome(3, "SIGTERM"))
        elif end == "hung":
            said = {"state": "hung", "reason": "rank 1 stood still", "exit_code": 76}
            attempt.status.write_text(json.dumps(said))
            assert processes.may_start_again(attempt), "another attempt follows"
        else:
            attempt.steps.write_text(json.dumps({"total_steps": 9}))
        return 0 if end == "success" else 137

    status = restarts.run_attempts(run, frozen, 2, start)
    assert started == ([1, 2] if end in ("restart", "hung") else [1])
    assert status == (0 if end == "success" else 137)
    assert not run.stop.exists()
    assert not processes.living(RunDir(run.path, started[-1]))
    assert store.load(run.config).resume == ("auto" if len(started) > 1 else "none")
    if len(started) > 1:
        lines = [json.loads(line) for line in run.failures.read_text().splitlines()]
        kind, step = ("hung", None) if end == "hung" else ("killed", 1)
        assert [line["attempt"] for line in lines] == [1, 2]
        assert all((line["kind"], line["step"]) == (kind, step) for line in lines)


def test_an_agent_that_may_start_its_ranks_again_is_seen(tmp_path: Path) -> None:
    """The rank has been killed; torchrun, its parent, lives."""
    run = RunDir(tmp_path, 1)
    run.logs.mkdir(parents=True)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom launcher.run import processes\n"
        "processes.write_record(Path(sys.argv[1]), None, os.getppid())"
    )
    subprocess.run([sys.executable, "-c", code, str(run.rank_process(0))], check=True)
    assert not processes.living(run)
    assert processes.may_start_again(run), "this process is the agent"
    run.rank_process(0).write_text(
        run.rank_process(0).read_text().replace(f'"agent": {os.getpid()}', '"agent": 4194304')
    )
    assert not processes.may_start_again(run)
