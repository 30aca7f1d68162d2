"""A real Slurm on this machine while the tests last: Debian's daemons, without systemd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin"
PACKAGES = "slurmctld slurmd slurm-client munge"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
SlurmdTimeout=30
ReturnToService=2
PropagateResourceLimits=NONE
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    daemons = ("slurmctld", "slurmd", "sbatch", "munged")
    lost = [name for name in daemons if shutil.which(name, path=PATH) is None]
    if lost:
        return f"there is no {', '.join(lost)}; apt-get install {PACKAGES}"
    return None if os.geteuid() == 0 else "Slurm's daemons want root"


class Slurm:
    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = nodes
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", *(f"spool-n{node}" for node in range(1, nodes + 1))):
            (folder / name).mkdir(parents=True)
        ports = _free_ports(nodes + 1)
        values = {"host": socket.gethostname(), "folder": folder, "nodes": nodes}
        values |= {"port": ports[0], "first": ports[1], "last": ports[-1]}
        (folder / "slurm.conf").write_text(CONF.format(**values))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def start(self) -> None:
        paths = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        paths |= {"key-file": "munge.key", "seed-file": "munge.seed"}
        self._run("munged", "--force", *(f"--{k}={self.folder / v}" for k, v in paths.items()))
        self._run("slurmctld")
        for node in range(1, self.nodes + 1):
            self._run("slurmd", "-N", f"n{node}")
        self.until(
            lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(self.nodes)
        )

    def stop(self) -> None:
        self.ask("scancel", "--user=root")
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)

    def ask(self, *words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True
        )
        return done.stdout

    def state(self, job: str) -> str:
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return next((w.removeprefix("JobState=") for w in words if w.startswith("JobState=")), "")

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"nothing in {seconds} s\n{self.words()}"
            time.sleep(0.2)

    def words(self) -> str:
        """What the daemons said last."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text()[-600:]}" for log in logs)

    def _run(self, *words: str) -> None:
        subprocess.run(words, env=self.environment, check=True, capture_output=True)


def _free_ports(count: int) -> list[int]:
    """Neighbours in number."""
    for first in range(17000, 30000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("", port))
                return list(range(first, first + count))
            except OSError:
                continue
    raise OSError("no free ports")
