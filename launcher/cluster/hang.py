"""What is known about ranks that stand still, and which of them the others wait for. No torch.

RUN/logs/attempt-N/hang-00.json     what the agent of node 0 says about its ranks
                   hang-00.txt      the stacks of all threads of these ranks
                   hang.txt         who is to blame, by the first agent that has heard the others
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.folders.json_file import COUNT, DamagedFile, Field, read_fields
from launcher.run import kernel_facts
from launcher.run.heartbeat import STACK_SIGNAL, Beat

STACK_SECONDS = 2.0  # in which a rank that can run has written its stacks
FRAME = re.compile(r'^  File "(?P<file>.*)", line \d+ in (?P<function>.+)$', re.MULTILINE)
COMPILERS = (  # files whose functions run only while something is compiled
    *("/torch/_dynamo/convert_frame.py", "/torch/_inductor/compile_fx.py"),
    *("/torch/_inductor/async_compile.py", "/triton/compiler/compiler.py"),
)
WRAPPERS = ("wrapper", "wait", "_wait", "inner", "__call__")
ENGINE = "_engine_run_backward"  # in which a rank computes, or waits for the sums of gradients


@dataclass(frozen=True)
class RankFacts:
    """A rank that stands still, as its agent sees it."""

    rank: int
    host: str
    does: str  # "in the data loader, for step 38"
    count: int  # marks that it has made: all ranks make the same ones
    state: str  # of its process, as the kernel has it
    waits_in: str | None  # what it waits in for other ranks; None: as far as is known, in nothing
    is_alone: bool  # whether what it does involves no other rank
    is_idle: bool  # whether its process does nothing
    is_compiling: bool = False

    @property
    def trouble(self) -> str | None:
        """What the kernel says against it."""
        if self.state in kernel_facts.STOPPED:
            return "is stopped by a signal (SIGSTOP?)"
        return "waits for a disk or a network file system" if self.state == "D" else None


@dataclass(frozen=True)
class NodeReport:
    """What the agent of one node says."""

    node: int
    suspects: bool  # it has found the hang itself; otherwise it answers another agent
    is_still: bool  # whether none of its ranks moves
    seconds: float  # since when none has moved
    ranks: list[RankFacts]


def find_facts(beat: Beat, stacks: str, state: str, is_idle: bool) -> RankFacts:
    """The facts about a rank whose stacks are `stacks`, empty if it could not write them."""
    frames = _frames_of(stacks, beat.main_thread)
    waits_in = None
    if beat.phase.is_waiting:
        waits_in = "the sizes of the next step"
    elif not beat.phase.is_alone and state not in kernel_facts.STOPPED:
        waits_in = _collective(frames, is_idle)
    return RankFacts(
        rank=beat.rank,
        host=os.uname().nodename,
        does=beat.phase.describe(beat.step),
        count=beat.count,
        state=state,
        waits_in=waits_in,
        is_alone=beat.phase.is_alone,
        is_idle=is_idle,
        is_compiling=any(part in file for file, _ in frames for part in COMPILERS),
    )


def take_stacks(beats: Sequence[Beat]) -> list[str]:
    """The stacks of all threads of each rank, which it writes itself; empty for one that cannot."""
    files = [Path(f"/proc/{beat.pid}/fd/{beat.stacks}") for beat in beats]
    before = [_size(file) for file in files]
    for beat in beats:
        with suppress(OSError):
            os.kill(beat.pid, STACK_SIGNAL)
    end = time.monotonic() + STACK_SECONDS
    sizes = before
    while time.monotonic() < end:
        time.sleep(0.2)
        earlier, sizes = sizes, [_size(file) for file in files]
        if sizes == earlier and all(a > b for a, b in zip(sizes, before, strict=True)):
            break
    return [_text(file, begin) for file, begin in zip(files, before, strict=True)]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _text(file: Path, begin: int) -> str:
    with suppress(OSError), file.open("rb") as opened:
        opened.seek(begin)
        return opened.read().decode(errors="replace")
    return ""


def _frames_of(stacks: str, thread: int) -> list[tuple[str, str]]:
    """(file, function) of the frames of one thread, the innermost first."""
    for block in re.split(r"\n(?=Thread 0x|Current thread 0x)", stacks):
        if re.match(rf"(Current thread|Thread) 0x0*{thread:x}\b", block):
            return [(each["file"], each["function"]) for each in FRAME.finditer(block)]
    return []


def _collective(frames: Sequence[tuple[str, str]], is_idle: bool) -> str | None:
    """The collective in which these frames wait; None if they do not wait in one."""
    if not frames:
        return None
    if "/torch/distributed/" in frames[0][0]:
        names = (name for file, name in frames if "/torch/distributed/" in file)
        return next((name for name in names if name not in WRAPPERS), frames[0][1])
    if is_idle and frames[0][1] == ENGINE:
        return "the sum of the gradients"
    if is_idle and "/launcher/strategy/" in frames[0][0]:
        return "a sum over the ranks"
    return None


def blame(reports: Sequence[NodeReport], missing: Mapping[int, Sequence[int]]) -> str:
    """Which ranks the others wait for, and what those wait in, as a sentence.

    Args:
        missing: The ranks of each node that does not answer.
    """
    ranks = [rank for report in reports for rank in report.ranks]
    if missing:
        silent = "; ".join(
            f"node {node} ({list_ranks(numbers)}) does not answer"
            for node, numbers in sorted(missing.items())
        )
        return f"{silent}; {_others(ranks)}" if ranks else silent
    culprits = _culprits(ranks)
    if not culprits:
        return f"all ranks wait for each other: {_others(ranks)}"
    named = "; ".join(_accuse(rank) for rank in culprits[:4])
    more = f"; {len(culprits) - 4} others likewise" if len(culprits) > 4 else ""
    others = [rank for rank in ranks if rank not in culprits]
    return f"{named}{more}" + (f"; {_others(others)}" if others else "")


def _culprits(ranks: Sequence[RankFacts]) -> list[RankFacts]:
    """The ranks against which there is the strongest evidence: the kernel's, that they wait for no
    other rank, or that they are behind."""
    behind = min((rank.count for rank in ranks), default=0)
    evidence = (
        [rank for rank in ranks if rank.state in kernel_facts.STOPPED],
        [rank for rank in ranks if rank.trouble],
        [rank for rank in ranks if rank.is_alone],
        [rank for rank in ranks if rank.waits_in is None and not rank.is_idle],
        [rank for rank in ranks if rank.waits_in is None],
        [rank for rank in ranks if rank.count == behind],
    )
    some = [each for each in evidence if each]
    return next((each for each in some if len(each) < len(ranks)), some[0] if some else [])


def _accuse(rank: RankFacts) -> str:
    where = f"rank {rank.rank} on {rank.host}"
    if rank.trouble:
        return f"{where} {rank.trouble}, {rank.does}"
    return f"{where} is {rank.does}" + ("" if rank.is_idle else " and keeps a processor busy")


def _others(ranks: Sequence[RankFacts]) -> str:
    """What the ranks do that are not to blame, those with the same together."""
    groups: dict[str, int] = {}
    for rank in ranks:
        does = rank.does.replace("waiting for", "wait for")
        text = f"wait in {rank.waits_in} ({rank.does})" if rank.waits_in else f"are {rank.does}"
        text = does if does.startswith("wait for") else text
        groups[text] = groups.get(text, 0) + 1
    return ", ".join(
        f"{count} other{'s' if count > 1 else ''} {text if count > 1 else _singular(text)}"
        for text, count in groups.items()
    )


def _singular(text: str) -> str:
    return text.replace("wait ", "waits ", 1) if text.startswith("wait ") else "is" + text[3:]


def list_ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, or `ranks 8–15`."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {min(numbers)}–{max(numbers)}"


_REPORT: dict[str, Field] = {
    "node": COUNT,
    "suspects": (lambda value: isinstance(value, bool), "true or false"),
    "is_still": (lambda value: isinstance(value, bool), "true or false"),
    "seconds": (lambda value: isinstance(value, int | float), "a number"),
    "ranks": (lambda value: isinstance(value, list), "a list"),
}


def read_report(file: Path) -> NodeReport | None:
    """None if it is not there, or not whole yet."""
    try:
        fields = read_fields(file, **_REPORT)
        ranks = [RankFacts(**rank) for rank in fields.pop("ranks")]
        return NodeReport(**fields, ranks=ranks)
    except (OSError, DamagedFile, TypeError):
        return None


def describe_stacks(beats: Sequence[Beat], facts: Sequence[RankFacts], stacks: list[str]) -> str:
    """The text of hang-NN.txt."""
    parts = []
    for beat, rank, text in zip(beats, facts, stacks, strict=True):
        written = text or "(it could not write its stacks)\n"
        title = f"rank {rank.rank} on {rank.host}, process {beat.pid}: {rank.does}"
        parts.append(f"=== {title}\n{kernel_facts.wait_text(beat.pid)}\n\n{written}")
    return "\n".join(parts)


def end_ranks(beats: Sequence[Beat]) -> None:
    """Kill the ranks and what they have started: one that is stopped receives no other signal."""
    pids = [pid for beat in beats for pid in (beat.pid, *kernel_facts.descendants(beat.pid))]
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
