"""A real Slurm on this machine during the tests: Debian's daemons, without systemd."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.helpers.commands import SHARDWAY

PATH = f"{os.environ['PATH']}:/usr/sbin"
PACKAGES = "slurmctld slurmd slurm-client munge"
CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
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
GresTypes=gpu
{places}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=8 RealMemory=4000"
NODE += " Gres=gpu:2"
NETWORK = "10.213.77"  # of nodes with separate networks

LONG = ("model=tiny", "strategy=ddp", "training.epochs=null", "training.global_batch_size=8")
LONG += ("training.max_steps=120", "training.log_steps=1", "tracking.plot=false")


def missing(apart: bool = False) -> str | None:
    """Why Slurm cannot run here; None if it can."""
    tools = ("slurmctld", "slurmd", "sbatch", "munged", *(("ip", "unshare") if apart else ()))
    lost = [name for name in tools if shutil.which(name, path=PATH) is None]
    if lost:
        return f"there is no {', '.join(lost)}; apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "Slurm's daemons want root"
    if apart and subprocess.run(["ip", "netns", "add", "shardway-try"]).returncode != 0:
        return "this machine gives no network namespaces"
    if apart:
        subprocess.run(["ip", "netns", "del", "shardway-try"], check=True)
    return None


class Slurm:
    """Nodes n1, n2 … on this machine; with `apart`, each has its own host name and network."""

    def __init__(self, nodes: int = 2, apart: bool = False) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        folder.chmod(0o755)  # users other than root can read the configuration
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.apart = apart
        # Nodes that share two cores: more threads would wait for each other.
        self.environment = {**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1"}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        port, *ports = _free_ports(nodes + 1)
        host = socket.gethostname()
        places = [
            NODE.format(
                name=node,
                host=node if apart else host,
                address=f"{NETWORK}.{number}" if apart else "127.0.0.1",
                port=ports[number - 1],
            )
            for number, node in enumerate(self.nodes, 1)
        ]
        address = f"{NETWORK}.254" if apart else "127.0.0.1"
        values = {"host": host, "address": address, "folder": folder, "port": port}
        (folder / "slurm.conf").write_text(CONF.format(**values, places="\n".join(places)))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text("".join(map(self._fake_gpus, self.nodes)))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def _fake_gpus(self, node: str) -> str:
        """Make device files that stand for the GPUs of `node`; its line of gres.conf."""
        for number in range(2):
            os.mknod(self.folder / f"{node}-gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        return f"NodeName={node} Name=gpu File={self.folder}/{node}-gpu[0-1]\n"

    def start(self) -> None:
        paths = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        paths |= {"key-file": "munge.key", "seed-file": "munge.seed"}
        self._run("munged", "--force", *(f"--{k}={self.folder / v}" for k, v in paths.items()))
        if self.apart:
            self._lay_cables()
        self._run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.until_idle()

    def start_node(self, node: str) -> None:
        inside = ["ip", "netns", "exec", f"shardway-{node}", "unshare", "--uts", "sh", "-c"]
        here = f"slurmd -N {node}"
        self._run(*([*inside, f"hostname {node} && {here}"] if self.apart else here.split()))

    def kill_node(self, node: str) -> None:
        """Kill only the node's daemon: the processes that it started stay alive."""
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)

    def until_idle(self) -> None:
        count = str(len(self.nodes))
        self.until(
            lambda: self.ask("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D").strip() == count
        )

    def cut(self, node: str) -> None:
        """Disconnect `node` from the network."""
        self._run("ip", "link", "set", f"shardway-{node}", "down")

    def resolve(self, node: str, address: str) -> None:
        """Let `node`, which is apart, find `address` for its own name first."""
        file = Path("/etc/netns") / f"shardway-{node}" / "hosts"
        others = [line for line in file.read_text().splitlines() if line.split()[1] != node]
        file.write_text("\n".join([*others, f"{address} {node}", ""]))

    def mount(self, node: str, source: Path, target: Path) -> None:
        """Let `node`, which is apart, see `source` where the others see `target`."""
        daemon = (self.folder / f"slurmd-{node}.pid").read_text().strip()
        inside = ["nsenter", "--mount", "--target", daemon]
        self._run(*inside, "mount", "--bind", str(source), str(target))

    def mend(self, node: str) -> None:
        self._run("ip", "link", "set", f"shardway-{node}", "up")

    def stop(self) -> None:
        self.ask("scancel", "--user=root")
        daemons = []
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                daemons.append(psutil.Process(int(file.read_text())))
                daemons[-1].terminate()
        psutil.wait_procs(daemons, timeout=20)
        if self.apart:
            self._take_cables_away()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lay_cables(self) -> None:
        """A bridge, and for each node a network namespace with a pair of interfaces."""
        self._take_cables_away()
        self._run("ip", "link", "add", "shardway", "type", "bridge")
        self._run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", "shardway")
        self._run("ip", "link", "set", "shardway", "up")
        hosts = {node: f"{NETWORK}.{number}" for number, node in enumerate(self.nodes, 1)}
        known = {"localhost": "127.0.0.1", **hosts, socket.gethostname(): f"{NETWORK}.254"}
        for node, address in hosts.items():
            space, inner = f"shardway-{node}", ["ip", "netns", "exec", f"shardway-{node}", "ip"]
            file = Path("/etc/netns") / space / "hosts"  # stands for /etc/hosts inside
            file.parent.mkdir(parents=True)
            file.write_text("".join(f"{number} {name}\n" for name, number in known.items()))
            self._run("ip", "netns", "add", space)
            words = f"link add {space} type veth peer name eth0 netns {space}"
            self._run("ip", *words.split())
            self._run("ip", "link", "set", space, "master", "shardway", "up")
            self._run(*inner, "addr", "add", f"{address}/24", "dev", "eth0")
            self._run(*inner, "link", "set", "eth0", "up")
            self._run(*inner, "link", "set", "lo", "up")

    def _take_cables_away(self) -> None:
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", f"shardway-{node}"], capture_output=True)
            subprocess.run(["ip", "link", "del", f"shardway-{node}"], capture_output=True)
            shutil.rmtree(f"/etc/netns/shardway-{node}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", "shardway"], capture_output=True)

    def ask(self, *words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True
        )
        return done.stdout

    def state(self, job: str) -> str:
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return next((w.removeprefix("JobState=") for w in words if w.startswith("JobState=")), "")

    def node_of(self, job: str) -> str:
        return self.ask("squeue", "-h", "-j", job, "-o", "%N").strip()

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"nothing in {seconds} s\n{self.words()}"
            time.sleep(0.2)

    def words(self) -> str:
        """The last log lines of the daemons."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text()[-600:]}" for log in logs)

    def _run(self, *words: str) -> None:
        subprocess.run(words, env=self.environment, check=True, capture_output=True)


def _free_ports(count: int) -> list[int]:
    """Consecutive port numbers."""
    for first in range(17000, 30000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("", port))
                return list(range(first, first + count))
            except OSError:
                continue
    raise OSError("no free ports")


def submit(slurm: Slurm, cwd: Path, *words: str, variables: dict[str, str] | None = None) -> str:
    """Queue a training run, with more environment variables; return the job's number."""
    done = subprocess.run(
        [*SHARDWAY, "train", "cluster=slurm", *words],
        cwd=cwd, env={**slurm.environment, **(variables or {})}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    queued = re.search(r"job (\d+) is in the queue", done.stdout)
    assert queued, done.stdout
    return queued[1]


def verb(slurm: Slurm, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one `shardway …` on the login node."""
    return subprocess.run(
        [*SHARDWAY, *words], cwd=cwd, env=slurm.environment, capture_output=True, text=True
    )


def out_of(run: Path) -> str:
    """What the jobs of a run have printed."""
    return "\n".join(file.read_text() for file in sorted((run / "logs").glob("slurm-*.out")))
