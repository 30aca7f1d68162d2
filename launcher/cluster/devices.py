"""What this machine has to compute with, asked without importing torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib import metadata


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


def gpu_memory() -> int | None:
    """Bytes of this machine's first GPU; None where none is visible or it does not say."""
    if not visible_gpus():
        return None
    import pynvml

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if first.isdigit():
            device = pynvml.nvmlDeviceGetHandleByIndex(int(first))
        else:
            device = pynvml.nvmlDeviceGetHandleByUUID(first)
        return int(pynvml.nvmlDeviceGetMemoryInfo(device).total)
    except pynvml.NVMLError:
        return None


def has_flash_attention() -> bool:
    """Whether the package is installed under the name that transformers looks for. (Version 4 is
    another package with the same modules.)"""
    try:
        metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_packages(names: list[str]) -> tuple[str, ...]:
    """Those of `names` that are not installed. Imports none."""
    return tuple(name for name in names if importlib.util.find_spec(name) is None)


def has_libaio() -> bool:
    """Whether a program can be built against it, as DeepSpeed does to have parameters on disk."""
    compiler = shutil.which(os.environ["CXX"] if "CXX" in os.environ else "c++")
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        built = subprocess.run(
            [compiler, "-x", "c++", "-", "-laio", "-o", f"{scratch}/program"],
            input=b"#include <libaio.h>\nint main() {}\n",
            capture_output=True,
        )
    return built.returncode == 0


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch compiles with on CPU."""
    return shutil.which(os.environ["CXX"] if "CXX" in os.environ else "g++") is not None


def has_liger() -> bool:
    """Whether Liger's kernels can be imported: not every torch brings the Triton that they need."""
    return not missing_packages(["liger_kernel", "triton"])


def interprets_triton() -> bool:
    """Whether Triton runs its kernels in Python, for which a CPU will do."""
    return os.environ.get("TRITON_INTERPRET") == "1"
