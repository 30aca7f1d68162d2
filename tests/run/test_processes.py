"""Who is alive: the records of an attempt's processes, compared with the processes themselves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run import processes
from launcher.run.status import run_state

RECORD = "from launcher.run import processes; from pathlib import Path; import sys; "
OTHER_BOOT = "00000000-0000-0000-0000-000000000000 pid:[4026531836]"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir(parents=True)
    return run


def a_rank(run: RunDir, rank: int, how: str = "input()") -> subprocess.Popen[bytes]:
    """A process that has written the record of a rank."""
    script = f"{RECORD}\nwith processes.recorded(Path(sys.argv[1])): print(flush=True); {how}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(run.rank_process(rank))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def changed(run: RunDir, rank: int = 0, **fields: Any) -> None:
    record = json.loads(run.rank_process(rank).read_text())
    run.rank_process(rank).write_text(json.dumps({**record, **fields}))


def test_an_attempt_runs_while_one_of_its_ranks_lives(run: RunDir) -> None:
    ranks = [a_rank(run, rank) for rank in range(2)]
    assert {process.pid for process in processes.living(run)} == {rank.pid for rank in ranks}
    assert not processes.has_lost_one(run)
    ranks[1].kill()
    while ranks[1].poll() is None:
        assert run_state(run, None) == "running"
    assert [process.pid for process in processes.living(run)] == [ranks[0].pid]
    assert processes.has_lost_one(run), "it did not end in order"
    ranks[0].communicate(b"\n")
    assert not run.rank_process(0).exists(), "it ended in order"
    assert run_state(run, None) == "failed"


def test_a_process_that_its_parent_has_not_noticed_is_dead(run: RunDir) -> None:
    rank = a_rank(run, 0)
    rank.kill()
    os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
    assert processes.living(run) == []
    rank.wait()


def test_another_process_with_the_same_number_is_not_the_rank(run: RunDir) -> None:
    processes.write_record(run.rank_process(0))
    assert processes.living(run) != []
    changed(run, started=1)
    assert processes.living(run) == []


def test_a_process_from_before_this_machine_was_started_again_is_dead(run: RunDir) -> None:
    processes.write_record(run.rank_process(0))
    changed(run, machine=OTHER_BOOT)
    assert processes.living(run) == []


def test_a_process_elsewhere_lives_while_it_renews_its_record(run: RunDir) -> None:
    processes.write_record(run.rank_process(0))
    changed(run, machine=OTHER_BOOT, host="n7")
    with pytest.raises(UserError, match=f"{run.path} is running on n7; stop it first: shardway"):
        processes.refuse_if_running(run)
    assert run_state(run, None) == "running"
    past = time.time() - 2 * processes.STALE_SECONDS
    os.utime(run.rank_process(0), (past, past))
    processes.refuse_if_running(run)
    assert run_state(run, None) == "failed"


def test_a_container_on_this_machine_is_judged_by_its_record(run: RunDir) -> None:
    """Its process numbers mean nothing here, and its host may have the name of this one."""
    processes.write_record(run.rank_process(0))
    (boot, _) = json.loads(run.rank_process(0).read_text())["machine"].split()
    changed(run, machine=f"{boot} pid:[1]", host=platform.node())
    assert processes.living(run) != []


def test_a_record_is_renewed_while_its_process_lives(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RENEW_SECONDS", 0.05)
    with processes.recorded(run.rank_process(0)):
        os.utime(run.rank_process(0), (1, 1))
        end = time.monotonic() + 60
        while run.rank_process(0).stat().st_mtime == 1:
            assert time.monotonic() < end


def test_an_attempt_with_a_status_has_no_processes(run: RunDir) -> None:
    processes.write_record(run.rank_process(0))
    run.status.write_text('{"state": "finished"}')
    assert processes.living(run) == []


def test_an_attempt_of_the_same_job_is_not_in_the_way(run: RunDir) -> None:
    """Slurm has given up the node where it still runs."""
    processes.write_record(run.starter, "17_2")
    processes.write_record(run.rank_process(0))
    processes.refuse_if_running(run, "17_2")
    with pytest.raises(UserError, match="is running; stop it first"):
        processes.refuse_if_running(run, "18")


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "3", "null", "[]", "{}", '{"pid": 1}', "[" * 100_000, "\xff"),
        '{"host": 1, "machine": 2, "pid": "x", "started": null, "job": []}',
        '{"host": "a", "machine": "", "pid": 1, "started": 1}',
        '{"host": "a", "machine": "b", "pid": true, "started": 1.5}',
        '{"host": "a", "machine": "b", "pid": 1, "started": 1, "more": 1}',
    ],
)
def test_a_damaged_record_is_no_process(run: RunDir, content: str) -> None:
    run.rank_process(0).write_text(content, encoding="latin-1")
    assert processes.living(run) == []
    assert not processes.has_lost_one(run)
