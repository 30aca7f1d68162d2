"""Compile guard.cpp, and load it before torch. Imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from launcher.folders import paths

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler: `CXX`, or what the system calls c++."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """The compiled guard, in Shardway's cache; compiled once for a version of torch, in seconds."""
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode())
    built = paths.cache() / "fake_cuda" / key.hexdigest()[:16] / "guard.so"
    if built.is_file():
        return built
    found = compiler()
    assert found, "no C++ compiler: install g++, or set CXX"
    torch = _torch_folder()
    built.parent.mkdir(parents=True, exist_ok=True)
    partial = built.with_suffix(f".{os.getpid()}")
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [found, "-shared", "-fPIC", "-std=c++20", *includes, str(SOURCE)]
    subprocess.run([*command, "-o", str(partial), *libraries], check=True)
    partial.replace(built)
    return built


def load(guard: Path) -> None:
    """Make torch believe that there is a CUDA device. torch must not be imported yet: it registers
    a guard of its own for devices that have none when it starts."""
    assert "torch" not in sys.modules, "the guard must be loaded before torch"
    # torch's own OpenMP first; otherwise the system's would be loaded beside it.
    for openmp in (_torch_folder() / "lib").glob("libgomp*"):
        ctypes.CDLL(str(openmp), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec, "torch is not installed"
    assert spec.origin
    return Path(spec.origin).parent
