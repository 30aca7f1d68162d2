"""The throughput of steps, measured without waiting for the device."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from launcher.training.flops import Flops, peak_flops

T = TypeVar("T")
Timestamp = float | torch.cuda.Event  # seconds on the host, or an event in the GPU's stream
PERCENTILE_STEPS = 100  # percentiles are taken over this many last steps


class Work(NamedTuple):
    """The size of one step on all ranks, in the order of `StepBatch.counts`."""

    targets: int  # tokens with a loss
    tokens: int  # without padding
    rows: int
    positions: int  # tokens and padding
    pairs: int  # of a token and a token that it attends to


class ThroughputMeter:
    """Times the steps of a logging interval.

    On a GPU, steps are timed by events in its stream. The events are read when the interval is
    logged, after others have waited for the device.
    """

    def __init__(
        self, device: torch.device, flops: Flops | None = None, peak: float | None = None
    ) -> None:
        """`flops`: of the model; `peak`: FLOP/s of the devices of all ranks. MFU needs both."""
        self.device, self.flops, self.peak = device, flops, peak
        self._step_seconds: deque[float] = deque(maxlen=PERCENTILE_STEPS)
        self.restart()

    @classmethod
    def create(
        cls,
        device: torch.device,
        flops: Flops | None,
        compute: torch.dtype,
        peak_tflops: float | None,
        num_devices: int,
        log: Callable[[str], None],
    ) -> ThroughputMeter:
        """A meter for `num_devices` devices like `device`; `peak_tflops` as configured. `log`
        receives a log line if nothing but the peak of a GPU is unknown."""
        peak = peak_flops(device, compute, peak_tflops)
        if flops is not None and peak is None and device.type == "cuda":
            name, dtype = torch.cuda.get_device_name(device), str(compute).removeprefix("torch.")
            log(
                f"mfu is not reported: the peak of {name} in {dtype} is not known "
                "→ tracking.peak_tflops=N"
            )
        return cls(device, flops, None if peak is None else peak * num_devices)

    def restart(self) -> None:
        """Start a new interval. The time since the last step belongs to no interval."""
        self._work: list[Work] = []
        self._data_wait_seconds = 0.0
        self._timestamps = [self._timestamp()]
        self._start_time = time.perf_counter()

    def time_data_wait(self, get: Callable[[int], T], step: int) -> T:
        """Call `get(step)`; its time counts as waiting for data."""
        start = time.perf_counter()
        batch = get(step)
        self._data_wait_seconds += time.perf_counter() - start
        return batch

    def add_step(self, work: Work) -> None:
        """Record that a step has ended, or is queued on the device."""
        self._work.append(work)
        self._timestamps.append(self._timestamp())

    def read(self) -> dict[str, float]:
        """The metrics of the interval by their names in metrics.jsonl. Starts a new interval.

        The caller must have waited for the device after the last `add_step`.
        """
        elapsed = max(time.perf_counter() - self._start_time, 1e-9)
        self._step_seconds.extend(
            _seconds_between(start, end) for start, end in pairwise(self._timestamps)
        )
        total = Work(*map(sum, zip(*self._work, strict=True)))
        metrics = {
            "tokens_per_second": round(total.tokens / elapsed, 1),
            "target_tokens_per_second": round(total.targets / elapsed, 1),
            "samples_per_second": round(total.rows / elapsed, 3),
            "step_seconds_p50": round(_percentile(self._step_seconds, 50), 6),
            "step_seconds_p95": round(_percentile(self._step_seconds, 95), 6),
            "data_wait": round(self._data_wait_seconds / elapsed, 4),
            "padding": round(1 - total.tokens / total.positions, 4),
            "peak_memory_bytes": self._peak_memory(),
        }
        if self.flops and self.peak:
            achieved = self.flops.total(total.tokens, total.pairs) / elapsed
            metrics["mfu"] = float(f"{achieved / self.peak:.4g}")
        self.restart()
        return metrics

    def _timestamp(self) -> Timestamp:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _peak_memory(self) -> int:
        """Bytes of this rank: of tensors on its GPU, otherwise of its process (Linux: VmHWM)."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        # Not getrusage, which includes the memory of the process before exec.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _seconds_between(start: Timestamp, end: Timestamp) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    return float(start.elapsed_time(end)) / 1000


def _percentile(values: deque[float], percent: int) -> float:
    """With linear interpolation, as numpy does by default."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
