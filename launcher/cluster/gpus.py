"""The GPUs that CUDA shows to a process on this machine, found without importing torch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.run.auto import BF16_CAPABILITY, Device, memory_in_use

VARIABLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
AMD_DRIVER = Path("/dev/kfd")  # its GPUs are unknown to NVML, and torch calls them CUDA devices


def visible_gpus() -> int:
    """The number of GPUs that CUDA shows to a process here.

    Without an NVIDIA driver: as many as `CUDA_VISIBLE_DEVICES` names. Ranks that find none of them
    refuse to run.
    """
    listed = listed_devices()
    if listed == []:
        return 0
    with open_nvml() as nvml:
        return len(listed or []) if nvml is None else len(visible_handles(nvml, listed))


def gpu_memory() -> int | None:
    """Memory of the first visible GPU or MIG device in bytes; None without one or if unknown."""
    return next((device.memory for device in visible_devices()), None)


def gpu_name() -> str | None:
    """What the driver calls the first visible GPU; None without one or if unknown."""
    return next((device.name for device in visible_devices()), None)


def visible_devices() -> list[Device]:
    """The visible GPUs or the visible MIG device; empty without one, or if the driver does not
    describe them."""
    return _described(listed_devices())


def devices_of_ranks(count: int) -> list[Device]:
    """The GPUs of `count` ranks; empty if the driver does not describe them, or does not say which
    they are.

    CUDA numbers the GPUs of a machine from the fastest, the driver from the first slot: where they
    differ, a number is not known to be the same GPU.
    """
    listed, machine = listed_devices(), _described(None)
    found = _described(listed)[:count]
    is_by_name = listed is not None and any(isinstance(each, str) for each in listed)
    are_alike = len({(each.has_bf16, each.memory) for each in machine}) == 1
    if is_by_name or are_alike or len(found) == len(machine) or _is_in_order_of_slots():
        return found
    return []


def _is_in_order_of_slots() -> bool:
    return os.environ.get(ORDER) == "PCI_BUS_ID"


def has_amd_driver() -> bool:
    """Whether ranks may find GPUs that NVML does not know, if nobody has hidden them."""
    return AMD_DRIVER.exists() and listed_devices() != []


def _described(listed: list[int] | list[str] | None) -> list[Device]:
    with open_nvml() as nvml:
        if nvml is None or listed == []:
            return []
        try:
            return [_describe(nvml, handle) for handle in visible_handles(nvml, listed)]
        except nvml.NVMLError:  # a GPU without memory of its own
            return []


def _describe(nvml: Any, handle: Any) -> Device:
    major, _ = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
    in_use = memory_in_use(int(memory.total), int(memory.free))
    return Device(str(name), True, major >= BF16_CAPABILITY, int(memory.total), in_use)


def listed_devices() -> list[int] | list[str] | None:
    """What CUDA reads from `CUDA_VISIBLE_DEVICES`: indices, or names with GPU- or MIG-; None if it
    is not set.

    The list ends before the first entry of another kind, such as -1, and a duplicate empties it.
    Source: CUDA Programming Guide, "CUDA Environment Variables", and
    torch.cuda._parse_visible_devices.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    entries = text.split(",")
    for prefix in ("GPU-", "MIG-"):
        if text.startswith(prefix):
            is_name = re.compile(prefix).match
            names = list(itertools.takewhile(is_name, entries))
            return names if len(set(names)) == len(names) else []
    numbers = [re.match(r"[+-]?\d+", entry.strip(), re.ASCII) for entry in entries]
    indices = [int(number[0]) if number else -1 for number in numbers]  # `1gpu2` is 1
    indices = list(itertools.takewhile(lambda index: index >= 0, indices))
    return indices if len(set(indices)) == len(indices) else []


def visible_handles(nvml: Any, listed: list[int] | list[str] | None) -> list[Any]:
    """NVML's handles of the visible GPUs: of those that are listed, up to the first that this
    machine does not have.

    If MIG devices are among them, CUDA shows only the first of these: NVIDIA MIG User Guide, "CUDA
    Device Enumeration".
    """
    gpus = [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]
    names = [nvml.nvmlDeviceGetUUID(gpu) for gpu in gpus]
    if listed and str(listed[0]).startswith("MIG-"):
        named = [pair for gpu in gpus for pair in _mig_devices(nvml, gpu)]
        return _choose(listed, [name for name, _ in named], [device for _, device in named])[:1]
    gpus = gpus if listed is None else _choose(listed, names, gpus)
    parts = [device for gpu in gpus for _, device in _mig_devices(nvml, gpu)]
    return parts[:1] or gpus


def _choose(listed: list[int] | list[str], names: list[str], devices: list[Any]) -> list[Any]:
    """The devices with these indices or these unique beginnings of names."""
    found: list[int] = []
    for entry in listed:
        index = entry if isinstance(entry, int) else _index_of(entry, names)
        if index is None or index >= len(devices):
            break
        found.append(index)
    # Two abbreviations of one name are a duplicate, too.
    return [devices[index] for index in found] if len(set(found)) == len(found) else []


def _index_of(prefix: str, names: list[str]) -> int | None:
    """The position of the one name that begins with `prefix`; None without one or with several."""
    matches = [index for index, name in enumerate(names) if name.startswith(prefix)]
    return matches[0] if len(matches) == 1 else None


def _mig_devices(nvml: Any, gpu: Any) -> list[tuple[str, Any]]:
    """(name, handle) of the MIG devices of a GPU, each also under its name before driver 470,
    MIG-GPU-UUID/INSTANCE/COMPUTE."""
    found = []
    for at in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):  # 0 for a GPU without MIG
        try:
            device = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, at)
        except nvml.NVMLError:  # an empty position
            continue
        instance = nvml.nvmlDeviceGetGpuInstanceId(device)
        compute = nvml.nvmlDeviceGetComputeInstanceId(device)
        former_name = f"MIG-{nvml.nvmlDeviceGetUUID(gpu)}/{instance}/{compute}"
        found += [(nvml.nvmlDeviceGetUUID(device), device), (former_name, device)]
    return found


@contextmanager
def open_nvml() -> Iterator[Any | None]:
    """NVML; None without a driver."""
    import pynvml  # slow to load with a driver

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
