"""What the driver says about the health of the visible GPUs. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.cluster.gpus import listed_devices, open_nvml, visible_handles

# Reasons why a GPU is slower than it should be, as bits (nvml.h, nvmlClocksEventReasons). A power
# cap is usual under load, and an idle GPU has low clocks.
THROTTLED = {
    0x08: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class GpuHealth:
    """One GPU; None where the driver does not say."""

    name: str
    uuid: str
    memory: int  # bytes
    free: int | None = None  # bytes
    driver: str = ""
    ecc: bool | None = None  # switched on
    uncorrected: int | None = None  # ECC errors since the driver was loaded
    temperature: int | None = None  # degrees Celsius
    throttled: str = ""  # why its clocks are reduced; empty if they are not


def inspect_gpus() -> list[GpuHealth]:
    """The visible GPUs, in order; empty without one or without an NVIDIA driver."""
    listed = listed_devices()
    with open_nvml() as nvml:
        if nvml is None or listed == []:
            return []
        return [_inspect(nvml, handle) for handle in visible_handles(nvml, listed)]


def _inspect(nvml: Any, handle: Any) -> GpuHealth:
    def ask(function: str, *arguments: Any) -> Any:
        # Not every GPU and not every driver knows everything, MIG devices least.
        with suppress(nvml.NVMLError, AttributeError):
            return getattr(nvml, function)(*arguments)
        return None

    memory, ecc = ask("nvmlDeviceGetMemoryInfo", handle), ask("nvmlDeviceGetEccMode", handle)
    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
    # NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC; NVML_TEMPERATURE_GPU
    errors = ask("nvmlDeviceGetTotalEccErrors", handle, 1, 0)
    return GpuHealth(
        name=str(ask("nvmlDeviceGetName", handle)),
        uuid=str(ask("nvmlDeviceGetUUID", handle)),
        memory=int(memory.total) if memory else 0,
        free=int(memory.free) if memory else None,
        driver=str(ask("nvmlSystemGetDriverVersion") or ""),
        ecc=bool(ecc[0]) if ecc else None,
        uncorrected=errors,
        temperature=ask("nvmlDeviceGetTemperature", handle, 0),
        throttled=", ".join(text for bit, text in THROTTLED.items() if reasons & bit),
    )
