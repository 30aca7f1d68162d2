"""The folder of a sweep: one run folder per combination of settings. Imports no torch.

SWEEP/sweep.json  summary.txt
    0/  1/  …       run folders
    setup.sh  train.sbatch      if it is a job array of Slurm
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config import TOP_LEVEL, Config, store
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.run import RunDir, new_run_path, runs_in

INDEX, SUMMARY = "sweep.json", "summary.txt"
INDEX_NAME = re.compile("0|[1-9][0-9]*")  # of a run's folder in a sweep


def assign_run_dirs(configs: list[Config]) -> list[Config]:
    """Give each configuration its own `run_dir` in one sweep folder: the folder that `run_dir`
    names, or `runs/<time>-sweep`. Creates nothing.

    Raises UserError if the folder exists and its runs are not to be resumed, or if the
    configurations cannot form one sweep.
    """
    named = sorted({config.run_dir or "" for config in configs})
    if len(named) > 1:
        raise UserError(
            f"run_dir differs between the runs of a sweep ({', '.join(named)}); set it to one "
            "folder, in which the runs will be 0, 1 …"
        )
    path = Path(named[0] or new_run_path("sweep")).absolute()
    if path.exists() and not (is_sweep(path) and configs[0].resume == "auto"):
        raise UserError(
            f"run_dir={path} exists; choose another, or resume its runs with resume=auto"
        )
    clusters = [config.cluster for config in configs]
    if any(cluster != clusters[0] for cluster in clusters):
        raise UserError(
            "all runs of a sweep must have the same cluster section; start runs with another "
            "cluster section separately"
        )
    return [
        dataclasses.replace(config, run_dir=str(path / str(index)))
        for index, config in enumerate(configs)
    ]


def create_folder(configs: list[Config]) -> Path:
    """Create the sweep folder that `assign_run_dirs` chose."""
    path = Path(configs[0].run_dir or "").parent
    path.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path / INDEX, {"argv": sys.argv, "runs": len(configs)}, private=True)
    return path


def is_sweep(path: Path) -> bool:
    """Whether `path` is the folder of a sweep."""
    return (path / INDEX).is_file()


def list_runs(path: Path) -> list[RunDir]:
    """The runs of a sweep that have started or are queued, in their order."""
    runs = [run for run in runs_in(path) if INDEX_NAME.fullmatch(run.path.name)]
    return sorted(runs, key=lambda run: int(run.path.name))


def run_of_task(path: Path, index: str | None) -> RunDir:
    """The run folder of a job: `path`, or for task `index` of a job array the run of that index."""
    return RunDir(path / index if index and is_sweep(path) else path)


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each configuration, the settings that are not the same in all, as override → value.

    The configurations are given as nested mappings, so that those of old versions can be compared.
    `run_dir` and `resume` are left out. A group of which different files are chosen (`method=full`)
    counts as one setting; settings that exist in only some of these files are left out.
    """
    sides = [dict(store.leaves_of(config)) for config in configs]
    if not sides:
        return []
    common = set.intersection(*(set(side) for side in sides)) - set(TOP_LEVEL)
    keys = [k for k in sides[0] if k in common and any(side[k] != sides[0][k] for side in sides)]
    return [{key.removesuffix(".name"): _format_value(side[key]) for key in keys} for side in sides]


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
