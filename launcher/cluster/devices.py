"""How many GPUs this machine shows, asked without importing torch."""

from __future__ import annotations

import os


def visible_gpus() -> int:
    """`CUDA_VISIBLE_DEVICES` if set, else what the NVIDIA driver counts; 0 without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        devices = [device.strip() for device in chosen.split(",")]
        return len([device for device in devices if device and device != "-1"])
    import pynvml  # slow to load where there is a driver; not needed when the list is given

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0  # no driver on this machine: ranks run on CPU
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
