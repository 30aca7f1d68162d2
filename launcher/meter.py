"""How fast steps go, without a wait of its own for the device."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from launcher import flops
from launcher.flops import Flops

T = TypeVar("T")
RECENT = 100  # steps of which percentiles are taken


class Work(NamedTuple):
    """What one step works on, on all ranks; in the order of `Window.counts`."""

    targets: int  # tokens with a loss
    tokens: int  # without padding
    rows: int
    positions: int  # with padding
    pairs: int  # of a token and one that it attends to


class Meter:
    """Times the steps of an interval on `device`; `peak`: FLOP/s of all ranks' devices at most.

    On a GPU a step is timed by events in its stream, which are read after others have waited.
    """

    def __init__(
        self, device: torch.device, flops: Flops | None = None, peak: float | None = None
    ) -> None:
        self.device, self.flops, self.peak = device, flops, peak
        self._seconds: deque[float] = deque(maxlen=RECENT)  # of the last steps
        self.restart()

    @classmethod
    def of(
        cls,
        device: torch.device,
        counted: Flops | None,
        compute: torch.dtype,
        stated: float | None,
        ranks: int,
        say: Callable[[str], None],
    ) -> Meter:
        """Knows the peak of `ranks` such devices, or says that it does not know that of a GPU."""
        one = flops.peak(device, compute, stated)
        if one is None and device.type == "cuda":
            say(
                f"mfu: none, the peak of {torch.cuda.get_device_name(device)} in {compute} is not "
                "known here; tracking.peak_tflops=N tells it"
            )
        return cls(device, counted, None if one is None else one * ranks)

    def restart(self) -> None:
        """An interval begins: nothing since the last step belongs to one."""
        self._work: list[Work] = []
        self._waited = 0.0  # seconds, for data
        self._marks = [self._mark()]
        self._began = time.perf_counter()

    def waiting(self, get: Callable[[int], T], step: int) -> T:
        """`get(step)`, whose time counts as waiting for data."""
        began = time.perf_counter()
        got = get(step)
        self._waited += time.perf_counter() - began
        return got

    def lap(self, work: Work) -> None:
        """A step has been done, or is queued on the device."""
        self._work.append(work)
        self._marks.append(self._mark())

    def read(self) -> dict[str, float]:
        """The figures of the interval, as metrics.jsonl names them; then another begins.

        The device must have been waited for, after the last `lap`.
        """
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        self._seconds.extend(self._between(*laps) for laps in pairwise(self._marks))
        done = Work(*map(sum, zip(*self._work, strict=True)))
        figures = {
            "tokens_per_second": round(done.tokens / elapsed, 1),
            "target_tokens_per_second": round(done.targets / elapsed, 1),
            "samples_per_second": round(done.rows / elapsed, 3),
            "step_seconds_p50": round(_percentile(self._seconds, 50), 6),
            "step_seconds_p95": round(_percentile(self._seconds, 95), 6),
            "data_wait": round(self._waited / elapsed, 4),
            "padding": round(1 - done.tokens / done.positions, 4),
            "peak_memory_bytes": self._peak_memory(),
        }
        if self.flops and self.peak:
            achieved = self.flops.of(done.tokens, done.pairs) / elapsed
            figures["mfu"] = float(f"{achieved / self.peak:.4g}")
        self.restart()
        return figures

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000

    def _peak_memory(self) -> int:
        """Bytes of this rank: of tensors on its GPU, else of its process (Linux: VmHWM)."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        # Not getrusage, which begins with what the process had before exec.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _percentile(values: deque[float], percent: int) -> float:
    """With linear interpolation, as numpy's default."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
