"""Which rank failed first, according to the reports of the ranks and their agent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest

from launcher.cluster import local
from launcher.cluster.local import Failure
from launcher.folders.run import RunDir
from launcher.run import stop

KILLED = """\
Root Cause (first observed failure):
  rank      : {rank} (local_rank: 1)
  exitcode  : -9 (pid: 5)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path)
    made.logs.mkdir(parents=True)
    return made


def report(run: RunDir, rank: int, time: float, lost_peer: bool = False) -> None:
    """Write a rank's report of its failure at `time`."""
    said = {"rank": rank, "exit_code": rank + 1, "message": f"m{rank}", "time": time}
    run.rank_error(rank).write_text(json.dumps({**said, "lost_peer": lost_peer}))


@pytest.mark.parametrize("times", [(1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (2.0, 3.0, 1.0)])
def test_the_report_with_the_earliest_time_is_the_first_failure(
    run: RunDir, times: tuple[float, ...]
) -> None:
    for rank, time in enumerate(times):
        report(run, rank, time)
    first = times.index(1.0)
    assert local.first_failure(run) == Failure(first, first + 1, f"m{first}")


def test_a_killed_rank_takes_precedence_over_reports_of_a_lost_peer(run: RunDir) -> None:
    (run.logs / "torchrun.log").write_text(KILLED.format(rank=1))
    report(run, 0, time=1.0, lost_peer=True)
    failure = local.first_failure(run)
    assert failure is not None
    assert (failure.rank, failure.exit_code) == (1, 137)
    report(run, 2, time=0.5)
    assert local.first_failure(run) == Failure(2, 3, "m2"), "it failed before the other was killed"


def test_a_node_is_lost_if_some_ranks_lost_a_peer_and_others_report_nothing(run: RunDir) -> None:
    assert not local.lost_a_node(run, world_size=3), "nobody has said anything"
    report(run, 0, time=1.0, lost_peer=True)
    report(run, 1, time=2.0, lost_peer=True)
    assert local.lost_a_node(run, world_size=3)
    report(run, 1, time=2.0)
    assert not local.lost_a_node(run, world_size=3), "rank 1 has a cause of its own"


def test_no_node_is_lost_if_all_ranks_report_a_lost_peer(run: RunDir) -> None:
    """All ranks still exist. The first to report failed, and a requeue would not fix that."""
    for rank in range(3):
        report(run, rank, time=3.0 - rank, lost_peer=True)
    assert not local.lost_a_node(run, world_size=3)
    assert local.first_failure(run) == Failure(2, 3, "m2")


def test_no_node_is_lost_if_a_signal_ended_a_rank(run: RunDir) -> None:
    report(run, 0, time=1.0, lost_peer=True)
    (run.logs / "torchrun.log").write_text(KILLED.format(rank=1))
    assert not local.lost_a_node(run, world_size=2)


@pytest.fixture
def signals(run: RunDir) -> Iterator[local._Signals]:
    """Those of a launcher whose agent only waits."""
    agent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield local._Signals(run, agent)
    agent.kill()
    agent.communicate()


@pytest.mark.parametrize(
    ("sequence", "ends"),
    [
        (("SIGTERM", "SIGTERM", "SIGHUP", "SIGTERM"), False),
        (("SIGINT", "SIGTERM"), False),
        (("SIGINT", "SIGINT"), True),
        (("SIGTERM", "later", "SIGTERM"), True),
        (("SIGHUP", "later", "SIGINT"), True),
    ],
)
def test_only_a_second_request_ends_the_agent(
    run: RunDir, signals: local._Signals, monkeypatch: pytest.MonkeyPatch,
    sequence: tuple[str, ...], ends: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(stop, "SAME_REQUEST_SECONDS", 0.3)
    for name in sequence:
        if name == "later":
            sleep(0.4)
        else:
            signals.receive(signal.Signals[name], None)
    assert run.stop.read_text() == sequence[0]
    assert signals.agent is not None
    if ends:
        assert signals.agent.wait(60) == -signal.SIGKILL
        assert signals.ended_by == signal.Signals[sequence[-1]]
    else:
        assert signals.ended_by is None
        assert signals.agent.poll() is None
