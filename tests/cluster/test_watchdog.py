"""How long a rank may stand still, and which one the others wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from launcher.cluster import hang
from launcher.cluster.hang import NodeReport, RankFacts, blame
from launcher.cluster.watchdog import Limits, Watched
from launcher.run import kernel_facts
from launcher.run.heartbeat import Beat, Board, Phase

FACTS = RankFacts(0, "n1", "in forward and backward of step 8", 40, "S", "all_reduce", False, True)


def report(*ranks: RankFacts) -> NodeReport:
    numbered = [replace(each, rank=number) for number, each in enumerate(ranks)]
    return NodeReport(0, True, True, 9.0, numbered)


@pytest.mark.parametrize(
    ("culprit", "said"),
    [
        (replace(FACTS, state="T", waits_in=None), "rank 1 on n1 is stopped by a signal"),
        (replace(FACTS, state="D", waits_in=None), "rank 1 on n1 waits for a disk"),
        (
            replace(FACTS, waits_in=None, is_alone=True, does="in the data loader, for step 8"),
            "rank 1 on n1 is in the data loader, for step 8; 2 others wait in all_reduce",
        ),
        (
            replace(FACTS, waits_in=None, is_idle=False),
            "rank 1 on n1 is in forward and backward of",
        ),
        (replace(FACTS, count=39), "rank 1 on n1 is in forward"),
    ],
    ids=["stopped", "disk", "data loader", "computes", "behind"],
)
def test_the_rank_that_differs_is_to_blame(culprit: RankFacts, said: str) -> None:
    assert blame([report(FACTS, culprit, FACTS)], {}).startswith(said)


def test_a_node_that_does_not_answer_is_to_blame() -> None:
    said = blame([report(FACTS, FACTS)], {7: range(56, 64)})
    assert said.startswith("node 7 (ranks 56–63) does not answer; 2 others wait in all_reduce")


@pytest.mark.parametrize(
    ("limits", "slowest", "expected"),
    [
        (Limits(None), 1.0, 120.0),
        (Limits(None), 60.0, 600.0),
        (Limits(30.0), 1.0, 30.0),
        (Limits(30.0), 60.0, 120.0),
        (Limits(None, is_stopping=True), 1.0, 15.0),
        (Limits(None, is_stopping=True), 60.0, 120.0),
    ],
)
def test_the_limit_of_a_step(limits: Limits, slowest: float, expected: float) -> None:
    assert limits.of_step(slowest) == expected


def watched(pid: int, phase: Phase, seconds: int, count: int = 1) -> Watched:
    """A process that was looked at after its mark and once more `seconds` later."""
    rank, beat = Watched(), Beat(count, phase, 1, pid, 0, 0, 0)
    rank.look(beat, 1.0)
    time.sleep(0.2)
    rank.look(beat, float(seconds))
    return rank


def test_a_save_that_does_nothing_is_overdue_and_one_that_computes_is_not() -> None:
    for code, is_overdue in (("input()", True), ("while True: pass", False)):
        command = [sys.executable, "-c", f"print(flush=True); {code}" if is_overdue else code]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if is_overdue:
                process.stdout.readline()
            time.sleep(0.3)
            rank = watched(process.pid, Phase.SAVE, 301)
            process.kill()
        assert rank.is_overdue(Limits(None)) == is_overdue


def test_a_stopped_process_is_overdue_while_it_loads_and_not_while_it_starts() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        os.kill(process.pid, signal.SIGSTOP)
        while (seen := kernel_facts.activity(process.pid)) and seen.state != "T":
            time.sleep(0.01)
        for phase, is_overdue in ((Phase.LOAD, True), (Phase.START, False)):
            rank = watched(process.pid, phase, 121)
            assert rank.is_overdue(Limits(None)) == is_overdue
        process.kill()


def test_a_part_of_a_step_is_timed_after_the_first_step() -> None:
    """Also a rank that computes without an end, and one whose steps are too short to be seen."""
    rank, pid = Watched(), os.getpid()
    rank.look(Beat(1, Phase.COMPUTE, 1, pid, 0, 0, 0), 1.0)
    rank.look(Beat(1, Phase.COMPUTE, 1, pid, 0, 0, 0), 121.0)
    assert not rank.is_overdue(Limits(None)), "the first step"
    rank.look(Beat(2, Phase.COMPUTE, 2, pid, 0, 0, 0, 1 << Phase.COMPUTE), 1.0)
    assert not rank.times
    rank.look(replace(rank.beat, count=2), 121.0)  # type: ignore[type-var]
    assert rank.is_overdue(Limits(None))
    rank.is_compiling = True
    assert not rank.is_overdue(Limits(None))


def test_a_rank_writes_its_stacks_when_its_agent_asks() -> None:
    board = Board(1)
    code = (
        "import time\nfrom launcher.run import heartbeat\n"
        "def in_a_loader():\n    time.sleep(100)\n"
        "with heartbeat.attached():\n"
        "    heartbeat.enter(heartbeat.Phase.BATCH, 7)\n    in_a_loader()\n"
    )
    variables = {"SHARDWAY_HEARTBEAT": str(board.path), "LOCAL_RANK": "0", "RANK": "3"}
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **variables}) as rank:
        while (beat := board.read(0)) is None or beat.phase != Phase.BATCH:
            assert rank.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        (stacks,) = hang.take_stacks([beat])
        rank.kill()
    assert "in in_a_loader\n" in stacks
    facts = hang.find_facts(beat, stacks, "S", is_idle=True)
    assert (facts.rank, facts.does, facts.waits_in) == (3, "in the data loader, for step 7", None)
