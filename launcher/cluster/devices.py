"""The software of this machine, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib import metadata


def has_flash_attention() -> bool:
    """Whether FlashAttention is installed under the package name that transformers checks.

    Version 4 is another package with the same modules.
    """
    try:
        metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_packages(names: list[str]) -> tuple[str, ...]:
    """The packages of `names` that are not installed. Imports none of them."""
    return tuple(name for name in names if importlib.util.find_spec(name) is None)


def has_libaio() -> bool:
    """Whether a program can be built with libaio. DeepSpeed needs it for parameters on disk."""
    compiler = shutil.which(os.environ["CXX"] if "CXX" in os.environ else "c++")
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        result = subprocess.run(
            [compiler, "-x", "c++", "-", "-laio", "-o", f"{scratch}/program"],
            input=b"#include <libaio.h>\nint main() {}\n",
            capture_output=True,
        )
    return result.returncode == 0


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile uses on CPU is installed."""
    return shutil.which(os.environ["CXX"] if "CXX" in os.environ else "g++") is not None


def has_liger() -> bool:
    """Whether Liger's kernels can be imported. They need Triton, which not every torch installs."""
    return not missing_packages(["liger_kernel", "triton"])


def interprets_triton() -> bool:
    """Whether Triton runs its kernels in its Python interpreter, which works on CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
