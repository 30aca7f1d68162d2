"""What a rank makes of the signals that it receives, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.folders.run import RunDir
from launcher.run import stop

SAME_REQUEST_SECONDS = 2.0
RANK = f"""
import sys, time
from pathlib import Path
from launcher.folders.run import RunDir
from launcher.run import stop
stop.SAME_REQUEST_SECONDS = {SAME_REQUEST_SECONDS}
stop.StopRequest(RunDir(Path(sys.argv[1]))).listen()
print(flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir(parents=True)
    return run


@pytest.fixture
def rank(run: RunDir) -> Callable[..., subprocess.Popen[bytes]]:
    def begin(*before: str, **variables: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", RANK, str(run.path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "RANK": "0", **variables},
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    return begin


def from_another(process: subprocess.Popen[bytes], name: str) -> None:
    """Send a signal that is not from the parent of `process`, as an agent's would be."""
    subprocess.run(["/bin/kill", "-s", name, str(process.pid)], check=True)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_signals_within_seconds_are_one_request_and_a_later_one_ends_the_rank(
    run: RunDir, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = rank()
    from_another(process, "TERM")
    until(lambda: run.stop.is_file() and run.stop.read_text() != "")  # else SIGHUP is taken first
    for name in ("TERM", "HUP", "INT", "USR2"):
        from_another(process, name)
    assert run.stop.read_text() == "SIGTERM"
    assert process.poll() is None
    time.sleep(SAME_REQUEST_SECONDS + 0.2)
    from_another(process, "INT")
    assert process.wait(60) == 128 + signal.SIGINT


def test_in_a_slurm_job_later_signals_are_the_same_request(
    run: RunDir, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    run.job.write_text('{"end": null}')
    process = rank()
    from_another(process, "USR2")
    until(run.stop.is_file)
    time.sleep(SAME_REQUEST_SECONDS + 0.2)
    from_another(process, "TERM")
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_hangup_is_ignored_under_nohup(
    run: RunDir, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = rank("nohup")
    from_another(process, "HUP")
    time.sleep(0.3)
    assert not run.stop.exists()
    assert process.poll() is None
    from_another(process, "TERM")
    until(run.stop.is_file)
    process.kill()
    process.wait()


def test_sigterm_of_torchrun_is_a_request_unless_a_rank_was_lost(
    run: RunDir, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The parent of a rank is the agent: here, this process."""
    process = rank()
    process.terminate()
    until(run.stop.is_file)
    assert process.poll() is None
    process.kill()
    process.wait()
    run.stop.unlink()
    record = f"processes.write_record(Path({str(run.rank_process(1))!r}))"
    script = f"from pathlib import Path; from launcher.run import processes; {record}"
    lost = subprocess.Popen([sys.executable, "-c", script])
    assert lost.wait(60) == 0
    process = rank()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not run.stop.exists()
    assert json.loads(run.rank_error(0).read_text())["lost_peer"], "it is not the first to fail"


def test_a_second_ctrl_c_to_torchrun_ends_the_rank(
    run: RunDir, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = rank()
    process.send_signal(signal.SIGINT)
    until(run.stop.is_file)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM


def test_sigterm_of_our_own_agent_ends_the_rank(
    run: RunDir, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """It passes no request on: a rank was lost, maybe before it had written its record."""
    process = rank(SHARDWAY_AGENT=str(os.getpid()))
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not run.stop.exists()


def test_a_request_keeps_its_reason_when_its_file_is_gone(run: RunDir) -> None:
    request = stop.StopRequest(run)
    assert not request.requested()
    run.stop.touch()
    until(request.requested)
    run.stop.unlink()
    assert request.requested()
    assert request.reason() == "stop"
    assert request.superseded_by() is None


def test_a_newer_attempt_is_a_request_and_is_named(run: RunDir) -> None:
    request = stop.StopRequest(run)
    for attempt in (2, 3):
        RunDir(run.path, attempt).logs.mkdir()
    assert request.requested()
    assert request.superseded_by() == 3
