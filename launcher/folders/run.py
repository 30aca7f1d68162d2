"""The names inside a run folder. Imports no torch.

RUN/config.yaml  launch.json  metrics.jsonl  loss.png
    tensorboard/  wandb/  mlruns/  trackers.json    written by tracking.trackers
    deepspeed.json                      DeepSpeed's configuration, under zero1, zero2 and zero3
    stop                                create it to stop: training ends after a step and saves
    logs/failures.jsonl                 one line for each attempt that failed
    logs/attempt-1/{config.yaml, steps.json, status.json, rank-00.log, rank-00.error.json,
                    starter.process.json, rank-00.process.json, …,
                    hang.txt, hang-00.json, hang-00.txt}    only of a run that has hung
    checkpoints/step-000045/            launcher/folders/checkpoint.py
    export/

A run folder may have come from somebody else: a name that is a link out of it raises LeadsOut. Only
`checkpoints` and `export` may be links to another disk: what they contain is recognized and checked
as a folder of its own, and never shown as text.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.errors import UserError
from launcher.folders import links, regular

CONSOLE = "console.log"
ATTEMPT = re.compile(r"attempt-([1-9][0-9]*)")  # the folder with the logs of an attempt


@dataclass(frozen=True)
class RunDir:
    """A run folder, given by its path. All code takes the names inside it from here.

    Each name raises LeadsOut, a UserError, if it leads out of the folder through a link.
    """

    path: Path
    attempt: int = 1  # each start of the run has its own logs

    @classmethod
    def from_logs(cls, logs: Path) -> RunDir:
        """The run and the attempt to which `RUN/logs/attempt-N` belongs.

        Raises UserError if there is no such folder.
        """
        with suppress(OSError):
            os.listdir(logs.parent)  # NFS may have cached that this attempt did not exist
        prefix, _, number = logs.absolute().name.rpartition("-")
        if prefix != "attempt" or not number.isdecimal() or not logs.is_dir():
            raise UserError(f"{logs} is not the folder of an attempt (RUN/logs/attempt-N)")
        return cls(logs.parents[1], int(number))

    def inside(self, *names: str) -> Path:
        """The path of a file or folder in it, which may not exist. Raises LeadsOut."""
        return links.inside(self.path, *names)

    def _in_logs(self, *names: str) -> Path:
        return self.inside("logs", f"attempt-{self.attempt}", *names)

    @property
    def has_config(self) -> bool:
        """Whether it is a run folder: it has a config.yaml, which is not opened."""
        return (self.path / "config.yaml").is_file()

    @property
    def config(self) -> Path:
        return self.inside("config.yaml")

    @property
    def launch(self) -> Path:
        return self.inside("launch.json")

    @property
    def metrics(self) -> Path:
        return self.inside("metrics.jsonl")

    @property
    def plot(self) -> Path:
        return self.inside("loss.png")

    @property
    def trackers(self) -> Path:
        return self.inside("trackers.json")  # tracker → id of its run

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def engine_config(self) -> Path:
        return self.inside("deepspeed.json")

    @property
    def stop(self) -> Path:
        return self.inside("stop")

    @property
    def logs(self) -> Path:
        return self._in_logs()

    @property
    def status(self) -> Path:
        return self._in_logs("status.json")

    @property
    def steps(self) -> Path:
        return self._in_logs("steps.json")  # total steps of the training, once known

    @property
    def failures(self) -> Path:
        return self.inside("logs", "failures.jsonl")  # of all attempts

    @property
    def submitted(self) -> Path:
        return self.inside("slurm.json")  # the job id and the sbatch command

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time start an attempt or make a checkpoint final.

        Raises UserError if the file system does not support locks.
        """
        self.inside("logs").mkdir(exist_ok=True)
        try:
            file = regular.open_descriptor(self.inside("logs", ".lock"), os.O_RDWR | os.O_CREAT)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be locked: {error.filename or 'flock'}: {error.strerror} → a "
                "run_dir on a file system that supports locks, without another logs/.lock in it"
            ) from error
        try:
            yield
        finally:
            os.close(file)

    def newest_attempt(self) -> RunDir:
        """The same run at its newest attempt; attempt 0 if there is none yet."""
        return RunDir(self.path, max(self.attempts(), default=0))

    def attempts(self) -> list[int]:
        """The numbers of the attempts that have logs, in order."""
        logs = self.path / "logs"
        names = [path.name for path in logs.iterdir() if path.is_dir()] if logs.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := ATTEMPT.fullmatch(name)))

    def log_files(self, pattern: str) -> list[Path]:
        """The files of the attempt's logs with these names, in order. Raises LeadsOut."""
        return [self._in_logs(file.name) for file in sorted(self.logs.glob(pattern))]

    @property
    def job(self) -> Path:
        return self._in_logs("job.json")  # facts about the Slurm job

    @property
    def starting(self) -> Path:
        return self.inside("logs", "starting")  # a job has started, but not yet its attempt

    def job_console(self, job: str) -> Path:
        """The output of a Slurm job. `job`: its number, ARRAY_INDEX for a task of an array."""
        return self.inside("logs", f"slurm-{job}.out")

    @property
    def rendezvous(self) -> Path:
        return self._in_logs("rendezvous")  # the address of rank 0, for the other nodes

    def agent_log(self, node: int) -> Path:
        """The output of a node's torchrun."""
        return self._in_logs(f"torchrun-{node:02d}.log")

    @property
    def hang(self) -> Path:
        """Which rank the others waited for, when nothing moved any more."""
        return self._in_logs("hang.txt")

    def hang_report(self, node: int) -> Path:
        """What a node's agent says about its ranks when nothing moves."""
        return self._in_logs(f"hang-{node:02d}.json")

    def hang_stacks(self, node: int) -> Path:
        """The stacks of a node's ranks at that time."""
        return self._in_logs(f"hang-{node:02d}.txt")

    @property
    def console(self) -> Path:
        """What the attempt printed on the terminal, with plain lines of progress."""
        return self._in_logs(CONSOLE)

    def rank_log(self, rank: int) -> Path:
        """stdout and stderr of a rank."""
        return self._in_logs(f"rank-{rank:02d}.log")

    @property
    def starter(self) -> Path:
        return self._in_logs("starter.process.json")  # the process that started the attempt

    def rank_process(self, rank: int) -> Path:
        """Where and as which process a rank runs."""
        return self._in_logs(f"rank-{rank:02d}.process.json")

    def rank_error(self, rank: int) -> Path:
        """The reason why a rank failed."""
        return self._in_logs(f"rank-{rank:02d}.error.json")


def runs_in(folder: Path) -> list[RunDir]:
    """The run folders in `folder`: those with a config.yaml, in no particular order."""
    if not folder.is_dir():
        return []
    runs = [RunDir(path) for path in folder.iterdir()]
    return [run for run in runs if run.has_config]


def new_run_path(label: str) -> Path:
    """A path in runs/ that does not exist yet: `runs/<time>-<label>`, with a number if that exists.

    The time is local time, which users recognize. Raises UserError if 999 such paths exist.
    """
    now = datetime.now(UTC).astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{now}-{label}"
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    path = next((path for each in names if not (path := Path("runs") / each).exists()), None)
    if path is None:
        raise UserError(f"runs/{name} to runs/{name}-999 exist; choose a path with run_dir=PATH")
    return path
