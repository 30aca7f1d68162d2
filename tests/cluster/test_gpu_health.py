"""What is read from the driver; NVML is the fake of test_gpus, with more answers."""

from __future__ import annotations

import sys

import pytest

from launcher.cluster.gpu_health import GpuHealth, inspect_gpus
from launcher.machines.doctor import describe_gpus
from tests.cluster.test_gpus import GIB, MIG, PLAIN, Driver


class Talkative(Driver):
    """A driver that knows the state of its GPUs: of the second, it is bad."""

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65"

    def nvmlDeviceGetEccMode(self, handle: str) -> list[int]:
        if handle.startswith("GPU-bb"):
            raise self.NVMLError("not supported")
        return [1, 1]

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        return 2 if (handle, kind, counter) == ("GPU-aa22", 1, 0) else 0

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 91

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return {"GPU-aa11": 0x4, "GPU-aa22": 0x40}.get(handle, 0x1)


def on(patch: pytest.MonkeyPatch, machine: dict[str, list[str]], kind: type[Driver]) -> None:
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    patch.setitem(sys.modules, "pynvml", kind(machine))  # type: ignore[arg-type]


def test_the_state_of_each_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, PLAIN, Talkative)
    first, second, third = inspect_gpus()
    total, free = 80 * GIB, 80 * GIB - GIB // 2
    known = ("the GPU-aa11", "GPU-aa11", total, free, "580.65", True, 0, 91, "")
    assert first == GpuHealth(*known), "a power cap is no fault"
    assert (second.uncorrected, second.throttled) == (2, "too hot (hardware)")
    assert (third.ecc, third.throttled) == (None, ""), "an idle GPU is none either"
    statuses = [(line.status, line.text.partition(":")[0]) for line in describe_gpus()]
    assert statuses == [("ok", "GPU 0"), ("refused", "GPU 1"), ("ok", "GPU 2")]


def test_a_driver_that_says_little_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, MIG, Driver)
    (part,) = inspect_gpus()
    assert part == GpuHealth("the MIG-c1", "MIG-c1", 10 * GIB, 10 * GIB - GIB // 2)
    assert [line.status for line in describe_gpus()] == ["ok"]


@pytest.mark.parametrize("machine", [{}, PLAIN])
def test_without_a_visible_gpu_there_is_none(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, list[str]]
) -> None:
    on(monkeypatch, machine, Talkative)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert inspect_gpus() == []
    assert [line.text for line in describe_gpus()] == ["none is visible: ranks run on the CPU"]
