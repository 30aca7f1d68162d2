"""The names inside a run folder, and its creation. Imports no torch.

RUN/config.yaml  launch.json  metrics.jsonl  loss.png
    tensorboard/  wandb/  mlruns/  trackers.json    of tracking.trackers
    deepspeed.json                      what DeepSpeed is told, under zero1, zero2 and zero3
    stop                                make it: training ends at a step boundary, with a checkpoint
    logs/attempt-1/{config.yaml, steps.json, status.json, rank-00.log, rank-00.error.json, …}
    checkpoints/step-000045/            launcher/checkpoint/layout.py
    export/
"""

from __future__ import annotations

import dataclasses
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher import manifest, versions
from launcher.config import Config, deepspeed, store
from launcher.config.data import HUB
from launcher.config.strategy import ZeroConfig
from launcher.errors import UserError


@dataclass(frozen=True)
class RunDir:
    """A run folder by its path; every name inside comes from here."""

    path: Path
    attempt: int = 1  # each start in the folder has its own logs

    @classmethod
    def of_logs(cls, logs: Path) -> RunDir:
        """The run and the attempt that `RUN/logs/attempt-N` belongs to."""
        return cls(logs.parents[1], int(logs.name.removeprefix("attempt-")))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def launch(self) -> Path:
        return self.path / "launch.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers.json"  # tracker → the id of its run

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def engine_config(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def logs(self) -> Path:
        return self.path / "logs" / f"attempt-{self.attempt}"

    @property
    def status(self) -> Path:
        return self.logs / "status.json"

    @property
    def steps(self) -> Path:
        return self.logs / "steps.json"  # of the whole training, once they are known

    @property
    def submitted(self) -> Path:
        return self.path / "slurm.json"  # the job's number, and how it was queued

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time begins an attempt or makes a checkpoint final.

        Raises UserError where the file system has no locks.
        """
        folder = self.path / "logs"
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be locked ({error.strerror}); choose a run_dir on a file "
                    "system with locks"
                ) from error
            yield

    def newest(self) -> RunDir:
        """The same run's last attempt; 0 where there is none yet."""
        numbers = (e.name.removeprefix("attempt-") for e in self.path.glob("logs/attempt-*"))
        return RunDir(self.path, max((int(n) for n in numbers if n.isdecimal()), default=0))

    @property
    def job(self) -> Path:
        return self.logs / "job.json"  # of Slurm

    @property
    def meeting(self) -> Path:
        return self.logs / "meeting"  # where ranks of several nodes find rank 0

    def agent_log(self, node: int) -> Path:
        return self.logs / f"torchrun-{node:02d}.log"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:02d}.log"

    def rank_error(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:02d}.error.json"


def attempt(config: Config, argv: list[str], world_size: int) -> tuple[RunDir, Config]:
    """Make the folder of a run, or a further attempt in it under resume=auto, and freeze the
    configuration there.

    Returns the folder and the configuration with `run_dir` filled in. A folder that was named and
    exists is else refused; without a name, `runs/<time>-<model>-<method>` gets a number when taken.
    """
    return begin(folder(config), config, argv, world_size)


def folder(config: Config) -> RunDir:
    """That of the run which resume=auto goes on with, else a new one, without an attempt yet."""
    if config.resume == "auto" and config.run_dir and (Path(config.run_dir) / "logs").is_dir():
        return RunDir(Path(config.run_dir).absolute())
    run = RunDir(_make(config).absolute())
    run.logs.parent.mkdir()
    run.checkpoints.mkdir()
    return run


def begin(run: RunDir, config: Config, argv: list[str], world_size: int) -> tuple[RunDir, Config]:
    """The next attempt in the folder of `run`, and the configuration that is frozen there."""
    run = _next_attempt(run.path)
    config = freeze(run, config)
    run.stop.unlink(missing_ok=True)  # meant for the attempt before
    manifest.write_json(run.launch, _circumstances(argv))
    if isinstance(config.strategy, ZeroConfig):
        told = (config.strategy, config.training, config.precision, world_size)
        manifest.write_json(run.engine_config, deepspeed.engine_config(*told))
    return run, config


def freeze(run: RunDir, config: Config) -> Config:
    """Write `config` into the folder of `run`, as it is read from anywhere; what is written."""
    config = dataclasses.replace(_with_absolute_paths(config), run_dir=str(run.path))
    manifest.write_text(run.config, store.dump(config))
    return config


def _next_attempt(path: Path) -> RunDir:
    """From here on no earlier attempt makes a checkpoint final."""
    with RunDir(path).lock():
        run = RunDir(path, RunDir(path).newest().attempt + 1)
        run.logs.mkdir(parents=True)
    return run


def unused(what: str) -> Path:
    """A folder in runs/ that is not there, by the time and `what`. Local time: a person looks for
    the run of this afternoon."""
    now = datetime.now(UTC).astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{now}-{what}"
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    free = next((path for each in names if not (path := Path("runs") / each).exists()), None)
    if free is None:
        raise UserError(f"runs/{name} and 998 like it exist; name one with run_dir=PATH")
    return free


def _make(config: Config) -> Path:
    while True:
        path = Path(config.run_dir or unused(f"{config.model.name}-{config.method.name}"))
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if isinstance(error, FileExistsError) and config.run_dir is None:
                continue  # another run was quicker
            where = config.run_dir or "runs/"
            raise UserError(f"run_dir={where} cannot be made: {error.strerror}") from error


def _with_absolute_paths(config: Config) -> Config:
    """What was named relative to this folder is found from any other, too."""

    def absolute(name: str) -> str:
        pattern = any(sign in name for sign in "*?[") and not name.startswith(HUB)
        return str(Path(name).absolute()) if pattern or Path(name).exists() else name

    model = config.model
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, name_or_path=absolute(model.name_or_path)),
        data=config.data.with_paths(absolute),
        resume=config.resume if config.resume in ("none", "auto") else absolute(config.resume),
    )


def _circumstances(argv: list[str]) -> dict[str, Any]:
    """What config.yaml does not say and a later reader may ask."""
    return {
        "argv": argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "versions": versions.installed(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the folder the command was typed in, None where git knows of none."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
