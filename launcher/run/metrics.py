"""The lines of metrics.jsonl, and what a table of runs needs of them. Imports no torch.

Nothing here keeps all lines: a run may have millions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from launcher.folders import regular

Record = dict[str, Any]

TAIL_BYTES = 1 << 16  # read first: about 200 records of steps
MAX_TAIL_BYTES = 1 << 22  # read at most, if the end of the file has no record of a step
BLOCK_BYTES = 1 << 20
MAX_STEP = 1 << 53
PACE_STEPS = 100  # records from which the speed is computed


def parse_record(line: bytes) -> Record | None:
    """The record in a line; None if the line is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "step" not in record:
        return None
    step = record["step"]
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < MAX_STEP
    return record if is_step else None


def number(record: Record, name: str) -> float | None:
    """A field as a finite number; None if it is missing or something else."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def is_evaluation(record: Record) -> bool:
    """Whether it is the record of an evaluation, and not of a step."""
    return "eval_loss" in record


def format_number(record: Record, name: str, form: str) -> str:
    """A field in the format `form`, also if it is not finite; empty if it is not a number."""
    value = record.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return format(value, form) if is_number else ""


@dataclass(frozen=True)
class Glance:
    """What the end of a metrics.jsonl says, and the best evaluation in all of it."""

    newest: Record = field(default_factory=dict)  # of the last step; empty without one
    pace: tuple[tuple[int, float], ...] = ()  # (step, time) of the last steps, oldest first
    best_eval_loss: float | None = None
    is_damaged: bool = False  # a line at the end of the file is not a record

    @classmethod
    def of(cls, path: Path, steps: int = PACE_STEPS) -> Glance:
        """Look at the file `path`, which may not exist, for its last `steps` steps."""
        try:
            with regular.open_file(path) as file:
                newest, pace, is_damaged = _last_steps(file, steps)
                return cls(newest, pace, _best_evaluation(file), is_damaged)
        except FileNotFoundError:
            return cls()
        except OSError:
            return cls(is_damaged=True)


def _last_steps(file: IO[bytes], steps: int) -> tuple[Record, tuple[tuple[int, float], ...], bool]:
    """The newest record of a step, (step, time) of the last `steps`, and whether a line among them
    is not a record."""
    size, is_padded = _end_of_text(file)
    length = TAIL_BYTES
    while True:
        file.seek(max(0, size - length))
        lines = file.read(min(size, length)).split(b"\n")
        complete = lines[:-1] if length >= size else lines[1:-1]  # the last one is being written
        newest, pace, is_damaged = _newest_first(complete, steps)
        if newest or length >= min(size, MAX_TAIL_BYTES):
            has_no_lines = not complete and size > MAX_TAIL_BYTES
            return newest, pace, is_damaged or is_padded or has_no_lines
        length *= 4


def _end_of_text(file: IO[bytes]) -> tuple[int, bool]:
    """Where the file ends without the zeros that a power failure leaves, and whether it has any."""
    end = size = os.fstat(file.fileno()).st_size
    while end:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        text = file.read(end - begin).rstrip(b"\0")
        end = begin + len(text)
        if text:
            break
    return end, end < size


def _newest_first(
    lines: list[bytes], steps: int
) -> tuple[Record, tuple[tuple[int, float], ...], bool]:
    newest: Record = {}
    pace: list[tuple[int, float]] = []
    is_damaged = False
    for line in reversed(lines):
        record = parse_record(line)
        if record is None:
            is_damaged = is_damaged or bool(line.strip())
        elif not is_evaluation(record):
            newest = newest or record
            if (time := number(record, "time")) is not None:
                pace.append((record["step"], time))
            if len(pace) >= steps:
                break
    return newest, tuple(reversed(pace)), is_damaged


def _best_evaluation(file: IO[bytes]) -> float | None:
    """The lowest finite evaluation loss. Only lines of evaluations are parsed."""
    best: float | None = None
    for line in _lines_with(file, b'"eval_loss"'):
        record = parse_record(line)
        loss = number(record, "eval_loss") if record else None
        if loss is not None and (best is None or loss < best):
            best = loss
    return best


def _lines_with(file: IO[bytes], words: bytes) -> Iterator[bytes]:
    """The complete lines that contain `words`."""
    file.seek(0)
    rest = b""
    while block := file.read(BLOCK_BYTES):
        block = rest + block
        end = block.rfind(b"\n") + 1
        at = block.find(words, 0, end)
        while at >= 0:
            begin = block.rfind(b"\n", 0, at) + 1
            line_end = block.find(b"\n", at)
            yield block[begin:line_end]
            at = block.find(words, line_end, end)
        # A line without an end is not kept beyond all bounds.
        rest = block[end:] if len(block) - end < MAX_TAIL_BYTES else b""
