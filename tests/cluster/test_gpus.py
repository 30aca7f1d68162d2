"""CUDA_VISIBLE_DEVICES is counted as CUDA counts it; NVML is a fake with the machine's GPUs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from launcher.cluster import gpus
from launcher.run.auto import Device

GIB = 1 << 30


class Driver:
    """The part of NVML that is used: GPUs by name, each with the names of its MIG devices."""

    class NVMLError(Exception):
        pass

    def __init__(self, machine: dict[str, list[str]]) -> None:
        self.machine = machine
        self.in_use = GIB // 2  # of each GPU, by the driver itself

    def nvmlInit(self) -> None:
        if not self.machine:
            raise self.NVMLError("no driver")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.machine)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.machine)[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7 if self.machine[handle] else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index >= len(self.machine[handle]):
            raise self.NVMLError("not found")
        return self.machine[handle][index]

    def nvmlDeviceGetGpuInstanceId(self, handle: str) -> int:
        return next(each.index(handle) for each in self.machine.values() if handle in each)

    def nvmlDeviceGetComputeInstanceId(self, handle: str) -> int:
        return 0

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"the {handle}"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (7, 5) if handle.startswith("GPU-bb") else (9, 0)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        total = 80 * GIB if handle.startswith("GPU-") else 10 * GIB
        return SimpleNamespace(total=total, free=total - self.in_use)


PLAIN: dict[str, list[str]] = {"GPU-aa11": [], "GPU-aa22": [], "GPU-bb33": []}
MIG = {"GPU-aa11": [], "GPU-aa22": ["MIG-c1", "MIG-c2"]}


def on(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, list[str]], listed: str | None
) -> Driver:
    """From now on this is that machine. Returns its driver."""
    monkeypatch.setitem(sys.modules, "pynvml", driver := Driver(machine))  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    return driver


LISTED = [
    (None, 3), ("", 0), ("-1", 0), ("0,1,2", 3), ("2,0", 2), (" 1 , 2 ", 2), ("0,1,3", 2),
    ("0,-1,1", 1), ("-1,0", 0), ("0,,1", 1), ("0,1,1", 0), ("0,1,-1,1", 2), ("1gpu2,2x", 2),
    ("no", 0), ("7", 0), ("0,GPU-bb33", 1),
    ("GPU-aa11,GPU-bb33", 2), ("GPU-bb", 1), ("GPU-aa", 0), ("GPU-bb,GPU-aa,GPU-aa11", 1),
    ("GPU-bb,GPU-bb", 0), ("GPU-bb,GPU-bb33", 0), ("GPU-aa11,0", 1), ("GPU-zz,GPU-aa11", 0),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "count"), LISTED)
def test_visible_gpus_are_counted_as_cuda_counts_them(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int
) -> None:
    on(monkeypatch, PLAIN, listed)
    assert gpus.visible_gpus() == count
    assert gpus.gpu_memory() == (80 * GIB if count else None)


@pytest.mark.parametrize(("listed", "count"), LISTED)
def test_the_count_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int
) -> None:
    """torch reads the variable in the same way, and asks NVML through C."""
    on(monkeypatch, PLAIN, listed)
    monkeypatch.setattr("torch.cuda._raw_device_count_nvml", lambda: len(PLAIN))
    monkeypatch.setattr("torch.cuda._raw_device_uuid_nvml", lambda: list(PLAIN))
    assert torch.cuda._device_count_nvml() == count  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("listed", "count"),
    [
        (None, 1), ("0", 1), ("1", 1), ("0,1", 1), ("MIG-c2", 1), ("MIG-c1,MIG-c2", 1),
        ("MIG-c", 0), ("MIG-GPU-aa22/1/0", 1), ("MIG-GPU-aa22/5/0", 0), ("MIG-c1,MIG-c1", 0),
    ],
)  # fmt: skip
def test_of_mig_devices_one_is_visible(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int
) -> None:
    on(monkeypatch, MIG, listed)
    assert gpus.visible_gpus() == count
    whole = listed == "0"  # the GPU that is not divided
    assert gpus.gpu_memory() == (None if not count else 80 * GIB if whole else 10 * GIB)


@pytest.mark.parametrize(
    ("listed", "count"),
    [(None, 0), ("0,1,3", 3), ("", 0), ("-1", 0), ("0,0", 0), ("GPU-1a2b", 1), ("GPU-a,GPU-b", 2)],
)
def test_without_a_driver_the_entries_are_counted(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int
) -> None:
    """The ranks find none of them, and refuse to run on the CPU instead."""
    on(monkeypatch, {}, listed)
    assert gpus.visible_gpus() == count
    assert gpus.gpu_memory() is None


@pytest.mark.parametrize(("name", "has_bf16"), [("GPU-aa11", True), ("GPU-bb33", False)])
def test_a_device_says_what_it_computes_in(
    monkeypatch: pytest.MonkeyPatch, name: str, has_bf16: bool
) -> None:
    on(monkeypatch, PLAIN, name)
    assert gpus.visible_devices() == [Device(f"the {name}", True, has_bf16, 80 * GIB)]
    on(monkeypatch, {}, name)
    assert gpus.visible_devices() == [], "without a driver nothing is known"
    on(monkeypatch, PLAIN, "")
    assert gpus.visible_devices() == []


def test_memory_that_others_hold_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = on(monkeypatch, PLAIN, "0")
    assert [each.free for each in gpus.visible_devices()] == [80 * GIB], "CUDA's own"
    driver.in_use = 60 * GIB
    assert [each.free for each in gpus.visible_devices()] == [20 * GIB]


ALIKE: dict[str, list[str]] = {"GPU-aa11": [], "GPU-aa22": []}


@pytest.mark.parametrize(
    ("machine", "listed", "order", "count", "names"),
    [
        (ALIKE, None, None, 1, ["GPU-aa11"]),
        (PLAIN, None, None, 3, ["GPU-aa11", "GPU-aa22", "GPU-bb33"]),  # all, in any order
        (PLAIN, None, None, 2, []),  # which of the three CUDA calls 0 and 1 is not known
        (PLAIN, "0,1", "FASTEST_FIRST", 2, []),
        (PLAIN, "0,1", "PCI_BUS_ID", 2, ["GPU-aa11", "GPU-aa22"]),
        (PLAIN, "GPU-bb33,GPU-aa11", None, 2, ["GPU-bb33", "GPU-aa11"]),
    ],
)
def test_the_gpus_of_ranks_are_known_if_their_numbers_are_the_drivers(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, list[str]], listed: str | None,
    order: str | None, count: int, names: list[str],
) -> None:  # fmt: skip
    on(monkeypatch, machine, listed)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    found = [device.name for device in gpus.devices_of_ranks(count)]
    assert found == [f"the {name}" for name in names]
