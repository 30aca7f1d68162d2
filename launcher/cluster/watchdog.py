"""The agent's watch over its ranks: a run in which nothing moves ends, and says who is to blame.

A thread of each node's agent reads the marks of its ranks (launcher/run/heartbeat.py). How long a
rank may stand still depends on what it does:

* in a part of a step, which has been timed before: a multiple of the longest such time;
* in anything else (preparing data, loading, compiling, the first step, saving): for a time in which
  the rank neither computes nor reads nor writes, because nobody knows how long that takes.

The agents of several nodes hear each other through the attempt's folder: if one still moves, there
is no hang. Only the time in which the agent itself runs counts, so a machine that was suspended has
not hung. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher.cluster import hang
from launcher.errors import HUNG
from launcher.folders import manifest
from launcher.folders.run import RunDir
from launcher.run import kernel_facts
from launcher.run.heartbeat import Beat, Board, Phase
from launcher.run.outcome import write_hung
from launcher.run.rank_log import say

POLL_SECONDS = 1.0
LISTEN_SECONDS = 3.0  # between two looks into the attempt's folder: a shared file system is slow
LEAST_STEP_SECONDS = 120.0  # with auto
TIMES_SLOWEST = 10  # with auto
IDLE_SECONDS = 300.0  # with auto, for what cannot be timed
STOP_SECONDS = 15.0  # once a person or Slurm waits for the end
DISK_WEIGHT = 1 / 6  # a second in which a rank waits for a disk: a flush may take minutes
ANSWER_SECONDS = 8.0  # in which the agents of other nodes answer
CALM_SECONDS = 30.0  # after a suspicion that another agent has refuted


@dataclass
class Limits:
    """How long a rank may stand still. `seconds`: of cluster.hang_seconds; None: auto."""

    seconds: float | None
    is_stopping: bool = False

    def of_step(self, slowest: float) -> float:
        """For a part of a step that took at most `slowest` seconds before."""
        if self.seconds is None:
            usual = max(LEAST_STEP_SECONDS, TIMES_SLOWEST * slowest)
        else:
            usual = max(self.seconds, 2 * slowest)
        return min(usual, max(STOP_SECONDS, 2 * slowest)) if self.is_stopping else usual

    def of_idle(self) -> float:
        """For a rank that does nothing."""
        usual = IDLE_SECONDS if self.seconds is None else self.seconds
        return min(usual, STOP_SECONDS) if self.is_stopping else usual

    def of_stopped(self) -> float:
        """For a process that a signal has stopped."""
        return min(self.of_idle(), LEAST_STEP_SECONDS)


@dataclass
class Watched:
    """What the agent has seen of one rank. Times are seconds in which the agent watched."""

    beat: Beat | None = None
    still: float = 0.0  # since the newest mark
    idle: float = 0.0  # since it last did something
    stopped: float = 0.0  # since a signal has stopped it
    is_compiling: bool = False  # by its stack, and until its next mark
    activity: kernel_facts.Activity | None = None
    times: dict[Phase, deque[float]] = field(default_factory=dict)

    def look(self, beat: Beat | None, elapsed: float) -> None:
        """Take in its newest mark, `elapsed` seconds after the mark before was taken in."""
        earlier, before = self.beat, self.activity
        self.beat = beat
        self.activity = now = kernel_facts.activity(beat.pid) if beat else None
        if beat is None or now is None:
            self.still = self.idle = self.stopped = 0.0
            return
        is_stopped = now.state in kernel_facts.STOPPED
        self.stopped = self.stopped + elapsed if is_stopped else 0.0
        if earlier is None or beat.count != earlier.count:
            if earlier is not None and earlier.is_timed:
                self.times.setdefault(earlier.phase, deque(maxlen=1000)).append(self.still)
            self.still, self.idle, self.is_compiling = 0.0, 0.0, False
            return
        self.still += elapsed
        if before is None or not now.is_idle_since(before, elapsed):
            self.idle = 0.0
        else:
            self.idle += elapsed * (DISK_WEIGHT if now.state == kernel_facts.DISK else 1)

    def is_overdue(self, limits: Limits, share: float = 1.0) -> bool:
        """Whether it stands still for longer than `share` of its limit."""
        if self.beat is None or self.activity is None or not self.beat.phase.is_watched:
            return False
        if self.stopped >= share * limits.of_stopped():
            return True
        if self.beat.is_timed and not self.is_compiling:
            # Without a time, each was shorter than the time between two looks.
            slowest = max(self.times.get(self.beat.phase, ()), default=0.0)
            return self.still >= share * limits.of_step(slowest)
        return self.idle >= share * limits.of_idle()

    @property
    def is_stopped(self) -> bool:
        return self.stopped > 0


class Watchdog:
    """Watches the ranks of this machine, whose marks are on `board`."""

    def __init__(
        self,
        run: RunDir,
        board: Board,
        seconds: float | None,
        is_stopping: Callable[[], bool],
        scratch: Path,
    ) -> None:
        """`seconds`: of cluster.hang_seconds; None: auto. `scratch`: a folder that is removed when
        the watchdog ends this process."""
        self.run, self.board, self.is_stopping, self.scratch = run, board, is_stopping, scratch
        self.limits = Limits(seconds)
        self.node = int(os.environ.get("SHARDWAY_NODE", "0"))
        self.nodes = int(os.environ.get("SHARDWAY_NODES", "1"))
        self.ranks = [Watched() for _ in range(board.ranks)]
        self._calm = 0.0  # seconds in which nothing is suspected
        self._looked = self._listened = time.monotonic()

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def _watch(self) -> None:
        try:
            while True:
                time.sleep(POLL_SECONDS)
                self._look()
                if self._suspects():
                    self._report(suspects=True)
                elif self.nodes > 1 and time.monotonic() - self._listened > LISTEN_SECONDS:
                    self._listened = time.monotonic()
                    self._answer()
        except Exception:
            traceback.print_exc()
            print("the watchdog has ended; hangs of this node are not found", file=sys.stderr)

    def _look(self) -> None:
        now = time.monotonic()
        # A longer time was no time of the ranks either: the machine, or all of them, were stopped.
        elapsed = min(now - self._looked, 2 * POLL_SECONDS)
        self._looked, self._calm = now, max(0.0, self._calm - elapsed)
        self.limits.is_stopping = self.is_stopping()
        for local_rank, rank in enumerate(self.ranks):
            rank.look(self.board.read(local_rank), elapsed)

    def _alive(self) -> list[Watched]:
        return [rank for rank in self.ranks if rank.activity is not None]

    def _suspects(self, share: float = 1.0) -> bool:
        alive = self._alive()
        overdue = [rank for rank in alive if rank.is_overdue(self.limits, share)]
        is_all = bool(overdue) and len(overdue) == len(alive)
        return self._calm == 0 and (is_all or any(rank.is_stopped for rank in overdue))

    def _report(self, suspects: bool) -> None:
        """Write what is known here; as the one who suspects, hear the others and end the run."""
        alive = self._alive()
        beats = [rank.beat for rank in alive if rank.beat is not None]
        stacks = hang.take_stacks(beats)
        facts = [
            hang.find_facts(beat, text, rank.activity.state, rank.idle > 0)
            for beat, rank, text in zip(beats, alive, stacks, strict=True)
            if rank.activity is not None
        ]
        if suspects and self._learns_of_compiling(alive, facts):
            return
        is_still = suspects or self._suspects(share=0.5)
        seconds = min((rank.still for rank in alive), default=0.0)
        report = hang.NodeReport(self.node, suspects, is_still, seconds, facts)
        manifest.write_text(
            self.run.hang_stacks(self.node), hang.describe_stacks(beats, facts, stacks)
        )
        manifest.write_json(self.run.hang_report(self.node), asdict(report))
        if suspects:
            self._hear(report)

    def _learns_of_compiling(self, alive: list[Watched], facts: list[hang.RankFacts]) -> bool:
        """Whether a rank is found to compile in the middle of the training: its limit is then that
        of work whose time nobody knows."""
        news = [r for r, f in zip(alive, facts, strict=True) if f.is_compiling > r.is_compiling]
        for rank in news:
            rank.is_compiling = True
        return bool(news)

    def _hear(self, own: hang.NodeReport) -> None:
        """Wait for the other agents. If none of them moves, the run ends here."""
        reports, end = {self.node: own}, time.monotonic() + ANSWER_SECONDS
        while len(reports) < self.nodes and time.monotonic() < end:
            time.sleep(0.5)
            reports |= self._reports()
            self._end_if_condemned()
            if not all(each.is_still for each in reports.values()):
                self._withdraw()
                self._calm = CALM_SECONDS
                return
        self._look()
        if not self._suspects():  # it has moved meanwhile
            self._withdraw()
            return
        missing = {
            node: range(node * self.board.ranks, (node + 1) * self.board.ranks)
            for node in range(self.nodes)
            if node not in reports
        }
        self._condemn(hang.blame([reports[node] for node in sorted(reports)], missing), own)

    def _condemn(self, reason: str, own: hang.NodeReport) -> None:
        """Say what has hung and end the run, unless another agent has done so."""
        with suppress(FileExistsError):
            with self.run.hang.open("x", encoding="utf-8") as file:
                file.write(f"{reason}\n")
            say(
                self.run,
                f"\nhung: {reason}\nnothing has moved for {own.seconds:.0f} s "
                "(cluster.hang_seconds); the run ends here\n"
                f"Stacks: {self.run.logs / 'hang-*.txt'}\nresume: shardway resume {self.run.path}",
            )
            write_hung(self.run, reason)
        self._end()

    def _reports(self) -> dict[int, hang.NodeReport]:
        """What the other agents say."""
        files = self.run.log_files("hang-[0-9]*.json")
        found = (hang.read_report(file) for file in files)
        return {each.node: each for each in found if each and each.node != self.node}

    def _answer(self) -> None:
        """Answer an agent that suspects a hang; take the answer back when it suspects none."""
        self._end_if_condemned()
        is_asked = any(each.suspects for each in self._reports().values())
        has_answered = self.run.hang_report(self.node).exists()
        if is_asked and not has_answered:
            self._report(suspects=False)
        elif has_answered and not is_asked:
            self._withdraw()

    def _end_if_condemned(self) -> None:
        """End with the run, if another agent has ended it."""
        if self.run.log_files(self.run.hang.name):  # listed: NFS may remember that it did not exist
            self._end()

    def _withdraw(self) -> None:
        for file in (self.run.hang_report(self.node), self.run.hang_stacks(self.node)):
            file.unlink(missing_ok=True)

    def _end(self) -> None:
        """End the ranks of this node and their agent."""
        hang.end_ranks([rank.beat for rank in self._alive() if rank.beat is not None])
        shutil.rmtree(self.scratch, ignore_errors=True)
        os._exit(HUNG)
