"""The curves of a run from its metrics.jsonl, in bounded memory. Imports no torch.

A curve keeps a few thousand points of millions. Lines are read once, and new ones when they come.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute
from pyarrow import json as arrow_json

from launcher.errors import UserError
from launcher.folders import regular
from launcher.io import arrow
from launcher.run.metrics import MAX_STEP, PACE_STEPS, Record, is_evaluation, number, parse_record

MAX_POINTS = 2_000  # of a curve
BLOCK_BYTES = 1 << 20  # read at a time
MAX_LINE_BYTES = 1 << 22
SMOOTHED = ("loss", "grad_norm")  # curves that have a moving average
SMOOTHING = 0.8  # weight of the moving average
# Of the last values, the newest first; those of older ones are below the precision of a double.
WEIGHTS = (1 - SMOOTHING) * SMOOTHING ** np.arange(160)
CURVES = ("loss", "learning_rate", "tokens_per_second", "peak_memory_bytes", "grad_norm")
FIELDS = (*CURVES, "eval_loss", "tokens", "time")
SCHEMA = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in FIELDS)])

Point = tuple[int, float]  # step, value
Steps = NDArray[np.int64]
Values = NDArray[np.float64]
# By name: the value of each line, NaN where a line does not have a finite one.
Columns = dict[str, Values]


@dataclass(frozen=True)
class _Stretches:
    """The points of a curve: two for each whole stretch, of its extremes, and all of the rest."""

    stride: int  # points in a stretch
    steps: Steps
    values: Values
    rest_steps: Steps
    rest_values: Values


NO_STEPS, NO_VALUES = np.empty(0, np.int64), np.empty(0)


class Curve:
    """At most `max_points` points of a curve: the lowest and the highest of each stretch of equally
    many points, and the last one. One thread may extend it while others read it."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self._max_stretches = max(2, (max_points - 3) // 2)
        self._kept = _Stretches(1, NO_STEPS, NO_VALUES, NO_STEPS, NO_VALUES)

    def extend(self, steps: Steps, values: Values) -> None:
        """Append points; `values` are finite."""
        kept = self._kept
        steps = np.concatenate([kept.rest_steps, steps])
        values = np.concatenate([kept.rest_values, values])
        whole = len(values) // kept.stride * kept.stride
        low_and_high = _extremes(steps[:whole], values[:whole], kept.stride)
        kept = _Stretches(
            kept.stride,
            np.concatenate([kept.steps, low_and_high[0]]),
            np.concatenate([kept.values, low_and_high[1]]),
            steps[whole:],
            values[whole:],
        )
        while len(kept.values) > 2 * self._max_stretches:
            kept = _merge_pairs(kept)
        self._kept = kept

    def points(self) -> list[Point]:
        """The points in their order."""
        kept = self._kept
        steps, values = kept.rest_steps, kept.rest_values
        low_and_high = _extremes(steps, values, len(values))
        all_steps = np.concatenate([kept.steps, low_and_high[0], steps[-1:]])
        all_values = np.concatenate([kept.values, low_and_high[1], values[-1:]])
        return list(dict.fromkeys(zip(all_steps.tolist(), all_values.tolist(), strict=True)))


def _merge_pairs(kept: _Stretches) -> _Stretches:
    """Make one stretch of every two; one that is left over becomes part of the rest."""
    even = len(kept.values) // 4 * 4
    steps, values = _extremes(kept.steps[:even], kept.values[:even], 4)
    rest_steps = np.concatenate([kept.steps[even:], kept.rest_steps])
    rest_values = np.concatenate([kept.values[even:], kept.rest_values])
    return _Stretches(2 * kept.stride, steps, values, rest_steps, rest_values)


def _extremes(steps: Steps, values: Values, stride: int) -> tuple[Steps, Values]:
    """The lowest and the highest of every `stride` points, in the order of the points."""
    if not stride or not len(values):
        return NO_STEPS, NO_VALUES
    rows = values.reshape(-1, stride)
    indexes = np.stack([rows.argmin(1), rows.argmax(1)], axis=1)
    indexes.sort(axis=1)
    flat = (indexes + np.arange(len(rows))[:, None] * stride).ravel()
    return steps[flat], values[flat]


class MovingAverage:
    """The exponential moving average, without the bias toward zero at the start (as in Adam)."""

    def __init__(self) -> None:
        self._count = 0
        self._before: Values = np.zeros(len(WEIGHTS) - 1)  # the last values

    def extend(self, values: Values) -> Values:
        """The average after each of `values`."""
        if not len(values):
            return values
        padded = np.concatenate([self._before, values])
        counts = np.arange(self._count + 1, self._count + len(values) + 1)
        self._before, self._count = padded[-len(self._before) :], self._count + len(values)
        averages: Values = np.convolve(padded, WEIGHTS, "valid") / (1 - SMOOTHING**counts)
        return averages


class EvenSample:
    """Some thousand values at equal distances, for a median."""

    def __init__(self, max_values: int = 4_096) -> None:
        self._max_values, self._stride, self._count = max_values, 1, 0
        self.values: Values = np.empty(0)

    def extend(self, values: Values) -> None:
        first = -self._count % self._stride
        self._count += len(values)
        self.values = np.concatenate([self.values, values[first :: self._stride]])
        while len(self.values) > self._max_values:
            self.values, self._stride = self.values[::2], 2 * self._stride


class RunMetrics:
    """What metrics.jsonl says about a run. `update` reads what is new in it."""

    def __init__(
        self,
        path: Path,
        max_points: int = MAX_POINTS,
        open_file: Callable[[Path], IO[bytes]] = regular.open_file,
    ) -> None:
        """`max_points`: of each curve. `open_file` may raise OSError or UserError."""
        self.path, self._max_points, self._open_file = path, max_points, open_file
        self._inode = 0
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self.count = 0  # records so far
        self.bad_lines = 0  # lines that are not records
        self.newest: Record = {}  # the record of the last step
        self.pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)  # (step, time)
        self.last_eval_loss: float | None = None
        self.best_eval_loss: float | None = None
        self.peak_memory: float | None = None  # bytes
        self.seconds_in_steps = 0.0  # without evaluation, saving and pauses between attempts
        self._tokens: float | None = None  # after the last step
        self._curves = {name: Curve(self._max_points) for name in CURVES}
        self._smoothed = {name: Curve(self._max_points) for name in SMOOTHED}
        self._averages = {name: MovingAverage() for name in SMOOTHED}
        self._evaluations = Curve(self._max_points)
        self._rates = EvenSample()

    def update(self) -> RunMetrics:
        """Read the lines that were added; all lines of a file that was cut or replaced, as a new
        attempt does. Returns itself."""
        # There may be none yet.
        with suppress(OSError, UserError), self._open_file(self.path) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._forget()
                self._inode = status.st_ino
            file.seek(self._offset)
            self._read(file)
        return self

    def points(self, name: str) -> list[Point]:
        """The sampled curve of a field of CURVES."""
        return self._curves[name].points()

    def smoothed(self, name: str) -> list[Point]:
        """The sampled moving average, over all points, of a field of SMOOTHED; otherwise empty."""
        return self._smoothed[name].points() if name in self._smoothed else []

    def evaluations(self) -> list[Point]:
        """The sampled evaluation losses."""
        return self._evaluations.points()

    def median_rate(self) -> float | None:
        """The median of tokens per second; None without a step."""
        return float(np.median(self._rates.values)) if len(self._rates.values) else None

    def _read(self, file: IO[bytes]) -> None:
        rest = b""
        while block := file.read(BLOCK_BYTES):
            block = rest + block
            end = block.rfind(b"\n") + 1
            rest = block[end:]
            self._offset += end
            if end:
                self._add(block[:end])
            if len(rest) > MAX_LINE_BYTES:  # zeros after a power failure
                self._offset, rest = self._offset + len(rest), b""
                self.bad_lines += 1

    def _add(self, block: bytes) -> None:
        columns = _fast_columns(block)
        if columns is None:
            records = [parse_record(line) for line in block.splitlines() if line.strip()]
            self.bad_lines += records.count(None)
            columns = _columns([record for record in records if record is not None])
        steps = columns.pop("step").astype(np.int64)
        self.count += len(steps)
        self._add_newest(block)
        self._add_evaluations(steps, columns)
        self._add_steps(steps, columns)
        self._add_seconds(steps, columns)

    def _add_newest(self, block: bytes) -> None:
        end = len(block) - 1  # of a line, at its line feed
        while end >= 0:
            begin = block.rfind(b"\n", 0, end) + 1
            record = parse_record(block[begin:end])
            if record is not None and not is_evaluation(record):
                self.newest = record
                return
            end = begin - 1

    def _add_evaluations(self, steps: Steps, columns: Columns) -> None:
        losses = columns["eval_loss"]
        has = np.isfinite(losses)
        if has.any():
            self._evaluations.extend(steps[has], losses[has])
            self.last_eval_loss, lowest = float(losses[has][-1]), float(losses[has].min())
            known = self.best_eval_loss
            self.best_eval_loss = lowest if known is None else min(known, lowest)

    def _add_steps(self, steps: Steps, columns: Columns) -> None:
        for name, curve in self._curves.items():
            has = np.isfinite(columns[name])
            values = columns[name][has]
            curve.extend(steps[has], values)
            if name in self._averages:
                self._smoothed[name].extend(steps[has], self._averages[name].extend(values))
        has = np.isfinite(columns["time"]) & ~np.isfinite(columns["eval_loss"])
        recent = steps[has][-PACE_STEPS:].tolist(), columns["time"][has][-PACE_STEPS:].tolist()
        self.pace.extend(zip(*recent, strict=True))
        memory = columns["peak_memory_bytes"]
        if len(memory := memory[np.isfinite(memory)]):
            self.peak_memory = max(self.peak_memory or 0.0, float(memory.max()))
        rates = columns["tokens_per_second"]
        self._rates.extend(rates[np.isfinite(rates)])

    def _add_seconds(self, steps: Steps, columns: Columns) -> None:
        counts, rates = columns["tokens"], columns["tokens_per_second"]
        has = np.isfinite(counts) & np.isfinite(rates)
        counts, rates = counts[has], rates[has]
        if not len(counts):
            return
        if self._tokens is None:
            # A run that resumed from another run's checkpoint starts with the tokens of that run.
            self._tokens = 0.0 if steps[has][0] == 1 else float(counts[0])
        new = np.diff(counts, prepend=self._tokens)
        self.seconds_in_steps += float((new[rates > 0] / rates[rates > 0]).sum())
        self._tokens = float(counts[-1])


def _fast_columns(block: bytes) -> dict[str, Values] | None:
    """The columns of a block of lines; None if a line is anything but a plain record."""
    read = arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    parse = arrow_json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
    try:
        table = arrow_json.read_json(io.BytesIO(block), read, parse, pa.system_memory_pool())
    except (pa.ArrowException, ValueError):
        return None
    steps = table["step"]
    if table.num_rows != block.count(b"\n") or steps.null_count:
        return None
    if not 0 <= compute.min(steps).as_py() <= compute.max(steps).as_py() < MAX_STEP:
        return None
    columns = {name: table[name].cast(pa.float64()) for name in SCHEMA.names}
    return {name: arrow.floats(column.combine_chunks()) for name, column in columns.items()}


def _columns(records: list[Record]) -> dict[str, Values]:
    steps = np.asarray([record["step"] for record in records], np.float64)
    fields = {name: [number(record, name) for record in records] for name in FIELDS}
    return {"step": steps} | {k: np.asarray(each, np.float64) for k, each in fields.items()}
