"""The names inside a run folder, and its creation. Imports no torch.

RUN/config.yaml  launch.json  metrics.jsonl  loss.png
    logs/attempt-1/{torchrun.log, rank-00.log, rank-00.error.json}
    checkpoints/step-000045/{manifest.json, adapter/ | model/}
    export/
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher import manifest, versions
from launcher.config import Config, store
from launcher.errors import UserError


@dataclass(frozen=True)
class RunDir:
    """A run folder by its path; every name inside comes from here."""

    path: Path

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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def logs(self, attempt: int = 1) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"

    def rank_log(self, rank: int, attempt: int = 1) -> Path:
        return self.logs(attempt) / f"rank-{rank:02d}.log"

    def rank_error(self, rank: int, attempt: int = 1) -> Path:
        return self.logs(attempt) / f"rank-{rank:02d}.error.json"


def create(config: Config, argv: list[str]) -> tuple[RunDir, Config]:
    """Make the folder of a run and freeze its configuration there.

    Returns the folder and the configuration with `run_dir` filled in. A folder that was named and
    exists is refused; without a name, `runs/<time>-<model>-<method>` gets a number when taken.
    """
    run = RunDir(_make(config).absolute())
    config = dataclasses.replace(_with_absolute_paths(config), run_dir=str(run.path))
    run.logs().mkdir(parents=True)
    run.checkpoints.mkdir()
    manifest.write_json(run.launch, _circumstances(argv))
    run.config.write_text(store.dump(config), encoding="utf-8")
    return run, config


def _make(config: Config) -> Path:
    try:
        if config.run_dir is not None:
            Path(config.run_dir).mkdir(parents=True)
            return Path(config.run_dir)
        # Local time: a person looks for the run of this afternoon.
        now = datetime.now(UTC).astimezone().strftime("%Y-%m-%d_%H-%M-%S")
        name = f"{now}-{config.model.name}-{config.method.name}"
        for attempt in range(1, 1000):
            path = Path("runs") / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
    except OSError as error:
        where = config.run_dir or "runs/"
        raise UserError(f"run_dir={where} cannot be made: {error.strerror}") from error
    raise UserError(f"runs/{name} and 998 like it exist; name one with run_dir=PATH")


def _with_absolute_paths(config: Config) -> Config:
    """What was named relative to this folder is found from any other, too."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).exists() else name

    data, model = config.data, config.model
    eval_path = absolute(data.eval_path) if data.eval_path else None
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, name_or_path=absolute(model.name_or_path)),
        data=dataclasses.replace(data, path=absolute(data.path), eval_path=eval_path),
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
