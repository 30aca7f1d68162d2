"""What this machine can do, one line a fact. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import devices
from launcher.cluster.gpu_health import inspect_gpus
from launcher.cluster.slurm_command import run_slurm
from launcher.errors import UserError, one_line
from launcher.folders import paths, versions
from launcher.io import network
from launcher.io.cpus import usable_cpus
from launcher.io.host_memory import usable_memory
from launcher.machines.facts import free_bytes
from launcher.machines.findings import OK, REFUSED, WARNING

SECONDS = 120  # for torch and DeepSpeed to be imported: the first time on a network disk
SLURM_SECONDS = 10
LITTLE_SPACE = 20e9  # bytes: a small model, its cache and a checkpoint
OPEN_FILES = 4096
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Line:
    """One fact."""

    status: str  # OK, WARNING or REFUSED
    topic: str
    text: str
    way_out: str = ""


def inspect_host() -> Iterator[Line]:
    """This machine. Importing torch and DeepSpeed, in another process, takes longest: last."""
    with ThreadPoolExecutor(1) as other:
        libraries = other.submit(_ask_libraries)
        yield Line(OK, "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
        yield _packages()
        yield Line(OK, "host", f"{usable_cpus()} CPUs, {usable_memory() / 1e9:,.1f} GB of memory")
        yield from describe_gpus()
        yield from _programs()
        yield from _network()
        yield from _limits()
        yield _slurm()
        yield _cache()
        yield from _features()
        yield from libraries.result()


def _packages() -> Line:
    versions_here = versions.installed_versions()
    missing = [name for name, version in versions_here.items() if version is None]
    if missing:
        return Line(REFUSED, "packages", f"not installed: {', '.join(missing)}", "pip install .")
    if mismatch := versions.describe_mismatch():
        text, _, way_out = mismatch.partition(". To match: ")
        return Line(WARNING, "packages", text, way_out)
    return Line(OK, "packages", f"shardway {versions_here['shardway']}, the tested versions")


def describe_gpus() -> Iterator[Line]:
    """The visible GPUs and their health."""
    gpus = inspect_gpus()
    if not gpus:
        yield Line(OK, "GPUs", "none is visible: ranks run on the CPU")
    for at, gpu in enumerate(gpus):
        text = f"GPU {at}: {gpu.name}, {gpu.memory / 1e9:,.0f} GB, driver {gpu.driver}"
        if gpu.uncorrected:
            text = f"{text}: {gpu.uncorrected} uncorrected ECC errors"
            yield Line(REFUSED, "GPUs", text, f"reset or replace {gpu.uuid}")
        elif gpu.throttled:
            yield Line(WARNING, "GPUs", f"{text}: throttled, {gpu.throttled}", "cooling, power")
        elif gpu.ecc is False:
            yield Line(WARNING, "GPUs", f"{text}: ECC is off", "nvidia-smi -e 1")
        else:
            yield Line(OK, "GPUs", text)


def _programs() -> Iterator[Line]:
    if devices.has_compiler():
        yield Line(OK, "compiler", "C++: torch.compile on CPU, and DeepSpeed's ops can be built")
    else:
        text = "no C++ compiler: training.compile on CPU and offloading are refused"
        yield Line(WARNING, "compiler", text, "apt-get install g++, or set CXX")
    if devices.has_libaio():
        yield Line(OK, "libaio", "strategy.offload_param=nvme works")
    else:
        text = "not found: strategy.offload_param=nvme is refused"
        yield Line(WARNING, "libaio", text, "apt-get install libaio-dev")


def _network() -> Iterator[Line]:
    found, host = network.interfaces(), socket.gethostname()
    listed = ", ".join(f"{name} {known[0]}" for name, known in found.items() if name != "lo")
    yield Line(OK, "network", listed or "no interface but loopback: one machine only")
    own = network.resolve(host)
    if not own:
        text = f"{host}, this machine's own name, does not resolve"
        yield Line(WARNING, "name", text, "a line in /etc/hosts; Shardway's ranks do not need it")
    elif any(map(network.is_loopback, own)):
        text = f"{host} resolves to {own[0]} here: other programs connect to themselves"
        yield Line(WARNING, "name", text, "its address in /etc/hosts; Shardway does not need it")
    else:
        yield Line(OK, "name", f"{host} resolves to {own[0]}")


def _limits() -> Iterator[Line]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if resource.RLIM_INFINITY != hard < OPEN_FILES:
        text = f"ulimit -Hn {hard}: hundreds of ranks need more"
        yield Line(WARNING, "open files", text, "LimitNOFILE= of slurmd, docker run --ulimit")
    else:
        yield Line(OK, "open files", f"ulimit -Hn {hard}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        yield Line(OK, "locked memory", "no limit")
    elif Path("/sys/class/infiniband").is_dir():
        text = f"ulimit -l {locked // 1024} KiB, and InfiniBand needs much of it"
        yield Line(WARNING, "locked memory", text, "LimitMEMLOCK=infinity of slurmd")
    else:
        yield Line(OK, "locked memory", f"ulimit -l {locked // 1024} KiB; no InfiniBand here")


def _slurm() -> Line:
    if shutil.which("sbatch") is None:
        return Line(OK, "Slurm", "no sbatch: cluster=slurm is refused on this machine")
    try:
        answer = run_slurm(["sinfo", "--noheader", "--format=%P %D %G"], seconds=SLURM_SECONDS)
    except UserError as error:
        reason = one_line(error)
        return Line(WARNING, "Slurm", f"{reason}", "a login node, SLURM_CONF, or cluster=local")
    rows = [line.split() for line in answer.splitlines() if len(line.split()) == 3]
    listed = ", ".join(f"{name} ({count} nodes, {gres})" for name, count, gres in rows)
    return Line(OK, "Slurm", listed or "no partition")


def _cache() -> Line:
    folder = paths.cache()
    size = sum(
        each.stat().st_size
        for top, _, names in os.walk(folder)
        for each in (Path(top, name) for name in names)
        if each.is_file() and not each.is_symlink()
    )
    free = free_bytes(folder)
    text = f"{folder}: {size / 1e9:,.1f} GB" + ("" if free is None else f", {free / 1e9:,.1f} free")
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(existing, os.W_OK):
        return Line(REFUSED, "cache", f"{text}; {existing} cannot be written", "SHARDWAY_CACHE=DIR")
    if free is not None and free < LITTLE_SPACE:
        return Line(WARNING, "cache", text, "free some space, or SHARDWAY_CACHE=DIR")
    return Line(OK, "cache", text)


def _features() -> Iterator[Line]:
    """Settings that this machine refuses, because an optional package is missing."""
    missing = devices.missing_packages(list(TRACKERS))
    refused = {f"tracking.trackers=[{name}]": f"pip install {name}" for name in missing}
    if not devices.has_liger():
        refused["training.loss=liger, training.kernels=liger"] = "pip install 'shardway[liger]'"
    if not devices.has_flash_attention():
        refused["model.attention=flash_attention_2"] = "pip install flash-attn (with a GPU)"
    for setting, way_out in refused.items():
        yield Line(WARNING, "optional", f"{setting} is refused here", way_out)


def _ask_libraries() -> list[Line]:
    command = [sys.executable, "-m", "launcher.machines.libraries"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        text = f"importing torch and DeepSpeed has not ended within {SECONDS} s"
        return [Line(REFUSED, "torch", text, " ".join(command))]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return [Line(REFUSED, "torch", f"it cannot be used: {reason}", " ".join(command))]
    found = json.loads(done.stdout.splitlines()[-1])
    seen = len(inspect_gpus())
    build = f"CUDA {found['cuda']}" if found["cuda"] else "for CPU"
    lines = [Line(OK, "torch", f"{found['torch']}, built {build}; it can use {found['gpus']} GPUs")]
    if seen > found["gpus"]:
        text = f"{found['torch']} can use {found['gpus']} of {seen} visible GPUs"
        lines = [Line(REFUSED, "torch", text, "a CUDA build of torch, and a driver for it")]
    nccl = f"NCCL {found['nccl']}" if found["nccl"] else "no NCCL in this build"
    lines.append(Line(OK, "messages", f"gloo for the CPU, {nccl}"))
    ops = ", ".join(found["ops"])
    lines.append(Line(OK, "DeepSpeed", f"ops that can be built here: {ops or 'none'}"))
    return lines
