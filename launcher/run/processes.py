"""Which processes run an attempt: each writes a record of itself. Imports no torch.

RUN/logs/attempt-N/starter.process.json    the process that started the attempt
                   rank-00.process.json …  a rank; removed when it ends in order

A record on this machine is checked against the process. Of one on another machine only its age is
known: a process renews its record while it lives.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.json_file import (
    COUNT,
    TEXT,
    DamagedFile,
    check_fields,
    or_null,
    read_fields,
)
from launcher.folders.manifest import write_json
from launcher.folders.run import RunDir
from launcher.run.outcome import ended_in_order

RENEW_SECONDS = 10
STALE_SECONDS = 90  # NFS may show an age that is a minute old


@dataclass(frozen=True)
class Process:
    """A process that writes to a run folder."""

    host: str
    machine: str  # where process numbers have the same meaning: a boot and a namespace
    pid: int
    started: int  # in clock ticks since boot: a number may be given to another process later
    job: str | None = None  # the Slurm job in which it runs
    agent: int | None = None  # of a rank: the process that started it, and may start another
    agent_started: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether its number means something on this machine."""
        return self.machine == _this_machine()

    def is_alive(self, renewed: float) -> bool:
        """Whether it still runs, if its record was renewed at `renewed` (seconds since 1970)."""
        if self.is_here and not _is_hidden(self.pid):
            return _start_of(self.pid) == self.started
        if self.host == platform.node() and self.machine.split()[0] != _this_machine().split()[0]:
            return False  # this machine was started again
        return time.time() - renewed < STALE_SECONDS


def write_record(file: Path, job: str | None = None, agent: int | None = None) -> None:
    """Write the record of this process to `file`. `agent`: the process that started it as a
    rank."""
    pid = os.getpid()
    started = _start_of(pid)
    assert started is not None, "this process exists"
    agent_started = None if agent is None else _start_of(agent)
    machine = platform.node(), _this_machine()
    process = Process(*machine, pid, started, job, agent, agent_started)
    write_json(file, asdict(process))


@contextmanager
def recorded(file: Path) -> Iterator[None]:
    """Keep a record of this process in `file` until the block ends in order."""
    write_record(file, os.environ.get("SLURM_JOB_ID"), os.getppid())
    threading.Thread(target=_renew, args=(file,), daemon=True, name="record").start()
    yield
    file.unlink(missing_ok=True)


def living(run: RunDir) -> list[Process]:
    """The processes of this attempt that still run. None do once it has a status."""
    if run.status.is_file():
        return []
    return [process for file, process in _records(run) if process.is_alive(_renewed(file))]


def may_start_again(run: RunDir) -> bool:
    """Whether the ranks of this attempt have ended, but not in order, and what may start them again
    still runs on this machine: the process that started the attempt, or torchrun's agent."""
    if ended_in_order(run):
        return False
    records = list(_records(run))
    agents = [(each.agent, each.agent_started) for _, each in records if each.is_here]
    starters = [each for file, each in records if file == run.starter and each.is_here]
    return any(each.is_alive(0.0) for each in starters) or any(
        pid and started and _start_of(pid) == started for pid, started in agents
    )


def has_lost_one(run: RunDir) -> bool:
    """Whether a rank of this attempt on this machine has ended, but not in order."""
    ranks = (process for file, process in _records(run) if file != run.starter)
    return any(rank.is_here and not rank.is_alive(0.0) for rank in ranks)


def refuse_if_running(run: RunDir, job: str | None = None) -> None:
    """Raise UserError if this attempt still runs, unless the Slurm job `job` has started it: Slurm
    starts a job again once the machines of its earlier attempt are lost."""
    alive = living(run)
    if not alive or (job and any(process.job == job for _, process in _records(run))):
        return
    hosts = sorted({process.host for process in alive if not process.is_here})
    where = f" on {', '.join(hosts)}" if hosts else ""
    raise UserError(f"{run.path} is running{where}; stop it first: shardway stop {run.path}")


def _records(run: RunDir) -> Iterator[tuple[Path, Process]]:
    for file in run.log_files("*.process.json"):
        if process := _read(file):
            yield file, process


def _read(file: Path) -> Process | None:
    """None if `file` is not a record of this version, or was removed."""
    types = {"host": TEXT, "machine": TEXT, "pid": COUNT, "started": COUNT, "job": or_null(TEXT)}
    try:
        content = read_fields(file, **types)
        check_fields(file, content, {"agent": COUNT, "agent_started": COUNT})
        process = Process(**content)
    except (DamagedFile, TypeError):
        return None
    return process if process.machine.strip() and process.pid > 0 else None


def _renewed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0  # it was removed at this moment


def _renew(file: Path) -> None:
    while True:
        time.sleep(RENEW_SECONDS)
        with suppress(OSError):
            os.utime(file)


@functools.cache
def _this_machine() -> str:
    """The boot of this machine, and the namespace of the process numbers (containers)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _is_hidden(pid: int) -> bool:
    """Whether the process of another user is not shown to this one (/proc with hidepid)."""
    if Path(f"/proc/{pid}").exists():
        return False
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return False


def _start_of(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if there is none, or a dead one that
    its parent has not noticed yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return None if state in "ZX" else int(fields[18])
