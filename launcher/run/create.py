"""Create a run folder, or start another attempt in an existing one. Imports no torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from launcher.config import Config, deepspeed, store
from launcher.config.schema.data import HUB
from launcher.config.schema.strategy import ZeroConfig
from launcher.config.secrets import secret_names
from launcher.errors import UserError
from launcher.folders import manifest, versions
from launcher.folders.run import RunDir, new_run_path
from launcher.run import auto, processes, resume


def start_attempt(config: Config, argv: list[str], world_size: int) -> tuple[RunDir, Config]:
    """Find or create the folder of a run, start an attempt in it and freeze the configuration.

    Returns the folder and the configuration with `run_dir` set. Without `run_dir` the folder is
    `runs/<time>-<model>-<method>`, with a number appended if that exists. Raises UserError if
    `run_dir` names a folder that exists, unless resume=auto continues its run.
    """
    return start_attempt_in(find_or_create_folder(config), config, argv, world_size)


def find_or_create_folder(config: Config) -> RunDir:
    """The folder of the run that resume=auto continues, or a new one. Starts no attempt."""
    if config.resume == "auto" and config.run_dir and (Path(config.run_dir) / "logs").is_dir():
        return RunDir(Path(config.run_dir).absolute())
    run = RunDir(_create_folder(config).absolute())
    run.logs.parent.mkdir()
    run.checkpoints.mkdir()
    return run


def start_attempt_in(
    run: RunDir,
    config: Config,
    argv: list[str],
    world_size: int,
    job: str | None = None,
    follows: int | None = None,
) -> tuple[RunDir, Config]:
    """Start the next attempt in the folder of `run`. Returns it and the frozen configuration.

    `follows`: the attempt of this process that has ended. Raises UserError if the newest attempt
    is another and still runs, unless the Slurm job `job` has started it.
    """
    run = _create_attempt(run.path, job, follows)
    config = freeze_config(run, config)
    run.stop.unlink(missing_ok=True)  # it was meant for the previous attempt
    run.starting.unlink(missing_ok=True)
    manifest.write_json(run.launch, _launch_record(argv), private=True)
    _write_engine_config(run, config, world_size)
    return run, config


def write_choice(run: RunDir, config: Config, world_size: int) -> None:
    """Freeze `config` again: the ranks have chosen what was auto in it."""
    _write_config(run, config)
    _write_engine_config(run, config, world_size)


def _write_config(run: RunDir, config: Config) -> None:
    manifest.write_text(run.config, store.dump(config), private=bool(secret_names(config.cluster)))


def _write_engine_config(run: RunDir, config: Config, world_size: int) -> None:
    if isinstance(config.strategy, ZeroConfig) and not auto.is_open(config):
        engine_config = deepspeed.engine_config(
            config.strategy, config.training, config.precision, world_size
        )
        manifest.write_json(run.engine_config, engine_config)


def freeze_config(run: RunDir, config: Config) -> Config:
    """Write `config` to the folder of `run` with absolute paths and the date that a chat template
    writes. Returns what was written."""
    config = dataclasses.replace(_with_absolute_paths(config), run_dir=str(run.path))
    data = dataclasses.replace(config.data, template_date=_template_date(run, config))
    config = dataclasses.replace(config, data=data)
    _write_config(run, config)
    return config


def _template_date(run: RunDir, config: Config) -> str | None:
    """The date that is set, that of the run to resume, or today's.

    It is None for a run of version 0.1.0, which has none.
    """
    if config.data.template_date:
        return config.data.template_date
    if run.has_config:
        return store.load(run.config).data.template_date
    if config.resume not in ("none", "auto"):
        return store.load(resume.named_checkpoint(config.resume).config).data.template_date
    return datetime.now(UTC).astimezone().date().isoformat()


def _create_attempt(path: Path, job: str | None, follows: int | None) -> RunDir:
    """Create the log folder of the next attempt, with the record of this process. From then on no
    earlier attempt can commit a checkpoint, and no later one can start while this one runs."""
    with RunDir(path).lock():
        newest = RunDir(path).newest_attempt()
        if newest.attempt != follows:
            processes.refuse_if_running(newest, job)
        run = RunDir(path, newest.attempt + 1)
        run.logs.mkdir(parents=True)
        processes.write_record(run.starter, job)
    return run


def _create_folder(config: Config) -> Path:
    while True:
        path = Path(config.run_dir or new_run_path(f"{config.model.name}-{config.method.name}"))
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if isinstance(error, FileExistsError) and config.run_dir is None:
                continue  # another run has taken this name
            folder = config.run_dir or "runs/"
            raise UserError(f"run_dir={folder} cannot be created: {error.strerror}") from error


def _with_absolute_paths(config: Config) -> Config:
    """Make relative paths absolute: the frozen configuration then works from any folder."""

    def absolute(name: str) -> str:
        is_pattern = any(character in name for character in "*?[") and not name.startswith(HUB)
        return str(Path(name).absolute()) if is_pattern or Path(name).exists() else name

    model = config.model
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, name_or_path=absolute(model.name_or_path)),
        data=config.data.with_paths(absolute),
        resume=config.resume if config.resume in ("none", "auto") else absolute(config.resume),
    )


def _launch_record(argv: list[str]) -> dict[str, object]:
    """What a later reader may want to know and config.yaml does not contain."""
    return {
        "argv": argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "versions": versions.installed_versions(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The git commit of the working directory; None if it is not in a git repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
