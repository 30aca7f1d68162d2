"""What each rank does at the moment, in memory that its agent reads. Imports no torch.

A mark is a store of a few bytes: no rank does more for it. The agent reads them from outside, so
that a rank which is stopped or waits for ever is seen, too (launcher/cluster/watchdog.py).
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

VARIABLE = "SHARDWAY_HEARTBEAT"  # in the environment of the ranks: the file of the marks
STACK_SIGNAL = signal.SIGRTMIN + 5  # a rank writes the stacks of its threads when it receives it
_MARK = struct.Struct("<QQqQ")  # how many marks there were, phase, step, bits of done phases
_WHO = struct.Struct("<iiiQ")  # pid, global rank, descriptor of the stacks, id of the main thread
_SLOT = 64  # bytes of a rank
assert _MARK.size + _WHO.size <= _SLOT


class Phase(IntEnum):
    """What a rank does. The text completes "rank 3 on node07 is …"."""

    START = 0
    PREPARE = 1
    LOAD = 2
    BATCH = 3
    AGREE = 4
    COMPUTE = 5
    UPDATE = 6
    EVALUATION_BATCH = 7
    EVALUATION_AGREE = 8
    EVALUATE = 9
    SAVE = 10
    FINISH = 11
    END = 12

    @property
    def is_watched(self) -> bool:
        """Not the start, which has a limit of its own: launch.rendezvous_minutes."""
        return self not in (Phase.START, Phase.END)

    @property
    def is_repeated(self) -> bool:
        """Whether it is a part of a step, whose time can be measured before."""
        return Phase.BATCH <= self <= Phase.EVALUATE

    @property
    def is_alone(self) -> bool:
        """Whether the rank waits for no other rank in it."""
        return self in (Phase.BATCH, Phase.EVALUATION_BATCH)

    @property
    def is_waiting(self) -> bool:
        """Whether the rank does nothing but wait for other ranks in it."""
        return self in (Phase.AGREE, Phase.EVALUATION_AGREE)

    def describe(self, step: int) -> str:
        """What the rank does in this phase of step `step`, counted from 1."""
        return _TEXTS[self].format(step=step)


_TEXTS = {
    Phase.START: "starting",
    Phase.PREPARE: "preparing the data",
    Phase.LOAD: "loading the model",
    Phase.BATCH: "in the data loader, for step {step}",
    Phase.AGREE: "waiting for the sizes of step {step} on all ranks",
    Phase.COMPUTE: "in forward and backward of step {step}",
    Phase.UPDATE: "in the optimizer of step {step}",
    Phase.EVALUATION_BATCH: "in the data loader, for batch {step} of the evaluation",
    Phase.EVALUATION_AGREE: "waiting for the sizes of batch {step} of the evaluation",
    Phase.EVALUATE: "evaluating batch {step}",
    Phase.SAVE: "saving after step {step}",
    Phase.FINISH: "finishing after step {step}",
    Phase.END: "ending",
}


@dataclass(frozen=True)
class Marks:
    """The phases of a step."""

    load: Phase
    agree: Phase
    compute: Phase


TRAINING = Marks(Phase.BATCH, Phase.AGREE, Phase.COMPUTE)
EVALUATION = Marks(Phase.EVALUATION_BATCH, Phase.EVALUATION_AGREE, Phase.EVALUATE)


@dataclass(frozen=True)
class Beat:
    """The newest mark of a rank."""

    count: int  # of marks so far
    phase: Phase
    step: int
    pid: int
    rank: int  # among all ranks
    stacks: int  # the descriptor, in the rank, of the file with its stacks
    main_thread: int
    done: int = 0  # a bit for each phase that the rank has been through before

    @property
    def is_timed(self) -> bool:
        """Whether it is a part of a step, and not the first one of its kind: that one compiles."""
        return self.phase.is_repeated and bool(self.done >> self.phase & 1)


class Board:
    """The marks of the ranks of one machine, as their agent reads them."""

    def __init__(self, ranks: int) -> None:
        """Make the memory. It has no name in a folder, and vanishes with its processes."""
        self.ranks = ranks
        self._file = os.memfd_create("shardway-heartbeat")
        os.ftruncate(self._file, ranks * _SLOT)
        self._memory = mmap.mmap(self._file, ranks * _SLOT)

    @property
    def path(self) -> Path:
        """Where the ranks open it."""
        return Path(f"/proc/{os.getpid()}/fd/{self._file}")

    def read(self, local_rank: int) -> Beat | None:
        """The newest mark of a rank; None if it has made none yet."""
        begin = local_rank * _SLOT
        count, phase, step, done = _MARK.unpack_from(self._memory, begin)
        pid, rank, stacks, thread = _WHO.unpack_from(self._memory, begin + _MARK.size)
        if not count:
            return None
        return Beat(count, Phase(phase), step, pid, rank, stacks, thread, done)


class _Heart:
    """Makes the marks of this rank."""

    def __init__(self, file: Path, local_rank: int, rank: int) -> None:
        descriptor = os.open(file, os.O_RDWR)
        try:
            self._memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self._begin, self._count = local_rank * _SLOT, 0
        stacks = os.memfd_create("shardway-stacks")
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        who = (os.getpid(), rank, stacks, threading.main_thread().ident or 0)
        _WHO.pack_into(self._memory, self._begin + _MARK.size, *who)
        self.step, self._phase, self._done = 0, Phase.START, 0

    def beat(self, phase: Phase, step: int) -> None:
        self._done |= 1 << self._phase
        self._count, self._phase, self.step = self._count + 1, phase, step
        _MARK.pack_into(self._memory, self._begin, self._count, phase, step, self._done)


_heart: _Heart | None = None


@contextmanager
def attached() -> Iterator[None]:
    """Mark what this rank does during the block, if its agent watches it."""
    global _heart
    file = os.environ.pop(VARIABLE, None)  # what this rank starts is no rank
    if file is not None:
        _heart = _Heart(Path(file), int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"]))
    enter(Phase.START)
    yield
    enter(Phase.END)


def enter(phase: Phase, step: int | None = None) -> None:
    """Mark that this rank begins `phase` of step `step`, counted from 1; None: of the same step.
    Call it in the main thread."""
    if _heart is not None:
        _heart.beat(phase, _heart.step if step is None else step)
