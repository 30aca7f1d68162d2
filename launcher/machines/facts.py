"""What one machine says about itself before a run: versions, files, limits, GPUs, network.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.cluster.gpu_health import GpuHealth, inspect_gpus
from launcher.config import Config
from launcher.config.schema.data import HUB
from launcher.data import source
from launcher.data.files.source_files import find_files
from launcher.errors import UserError, one_line
from launcher.folders import versions
from launcher.folders.model import is_hub_id
from launcher.io import network

WHOLE_BYTES = 32_000_000  # a file up to this size is read completely
SAMPLE_BYTES = 1 << 20  # of a larger one: its beginning and its end
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Facts:
    """What the first rank of a machine says."""

    rank: int
    node: str
    versions: dict[str, str | None] = field(default_factory=dict)
    config: str = ""  # digest of RUN/config.yaml, as it is read here
    model: dict[str, str] = field(default_factory=dict)  # file → digest
    data: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    sees_note: bool = True  # the file that rank 0 has written into the run folder
    resolves_to: list[str] = field(default_factory=list)  # its own name
    interface: str = ""
    address: str = ""
    port: int = 0  # where it listens for the test of connections
    locked_memory: int = -1  # bytes; -1: no limit
    infiniband: bool = False
    gpus: list[GpuHealth] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Facts:
        """The facts that `dataclasses.asdict` has made a dict of."""
        return cls(**{**values, "gpus": [GpuHealth(**each) for each in values["gpus"]]})


def node_name() -> str:
    """This machine, as Slurm's --exclude names it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gather(config: Config, frozen: Path) -> dict[str, Any]:
    """The fields of `Facts` that this machine determines alone. `frozen`: RUN/config.yaml."""
    problems: list[str] = []
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "versions": {"python": platform.python_version(), **versions.installed_versions()},
        # Without a shared disk it names another folder on each machine.
        "config": digest(frozen) if config.launch.shared_disk else "",
        "model": digests(model_files(config, problems), problems),
        "data": digests(data_files(config, problems), problems),
        "unreadable": problems,
        "resolves_to": network.resolve(socket.gethostname()),
        "locked_memory": -1 if limit == resource.RLIM_INFINITY else limit,
        "infiniband": INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        "gpus": inspect_gpus(),
    }


def model_files(config: Config, problems: list[str]) -> Iterator[Path]:
    """The files of the model and of an adapter that is trained further. Appends what is missing to
    `problems`. A hub id has none: each machine downloads it."""
    adapter = getattr(config.method, "adapter", None)
    names = {"model.name_or_path": config.model.name_or_path, "method.adapter": adapter}
    for key, name in names.items():
        if name is None or is_hub_id(name):
            continue
        try:
            entries = sorted(Path(name).iterdir())
        except OSError as error:
            problems.append(f"{key}={name}: {error.strerror}")
            continue
        yield from (each for each in entries if each.is_file() and not each.name.startswith("."))


def data_files(config: Config, problems: list[str]) -> Iterator[Path]:
    """The files of all sources, evaluation included. Appends what is missing to `problems`."""
    try:
        sources = list(source.resolve_sources(config.data).values())
        sources += [source.evaluation_config(config.data)] if config.data.eval_path else []
        for each in sources:
            if each.path and not each.path.startswith(HUB):
                yield from find_files(each)
    except UserError as error:
        problems.append(str(error))


def digests(files: Iterator[Path], problems: list[str]) -> dict[str, str]:
    """Path → digest. Appends the files that cannot be read to `problems`."""
    found = {}
    for file in files:
        try:
            found[str(file)] = digest(file)
        except OSError as error:
            problems.append(f"{file}: {one_line(error)}")
    return found


def digest(file: Path) -> str:
    """Tells two files apart by their size and content, of which large files are not read whole: of
    safetensors the header, of others the beginning and the end. Raises OSError."""
    size = file.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if file.suffix == ".safetensors":
            length = stream.read(8)
            content.update(length)
            content.update(stream.read(min(int.from_bytes(length, "little"), WHOLE_BYTES)))
        elif size <= WHOLE_BYTES:
            content.update(stream.read())
        else:
            content.update(stream.read(SAMPLE_BYTES))
            stream.seek(-SAMPLE_BYTES, os.SEEK_END)
            content.update(stream.read())
    return content.hexdigest()[:16]


def free_bytes(folder: Path) -> int | None:
    """What a process of this user may still write to the disk of `folder`, or of the folder above
    it that exists; None if it is unknown."""
    for candidate in (folder, *folder.parents):
        with suppress(OSError):
            stat = os.statvfs(candidate)
            return stat.f_bavail * stat.f_frsize
    return None
