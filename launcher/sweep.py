"""A sweep's folder: a run folder for each combination, and what differs between them. No torch.

SWEEP/sweep.json  summary.txt
    0/  1/  …       run folders
    setup.sh  train.sbatch      where it is a job array of Slurm
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from launcher import manifest, run_dir
from launcher.config import TOP_LEVEL, Config, store
from launcher.errors import UserError
from launcher.run_dir import RunDir

INDEX, SUMMARY = "sweep.json", "summary.txt"


def place(configs: list[Config]) -> list[Config]:
    """Each of several configurations with a `run_dir` of its own in one folder: that which
    `run_dir` names, else `runs/<time>-sweep`. Makes nothing.

    Raises UserError where a folder is there and nothing is to go on, or where they cannot be one
    sweep.
    """
    named = sorted({config.run_dir or "" for config in configs})
    if len(named) > 1:
        raise UserError(
            f"run_dir differs between the runs of a sweep ({', '.join(named)}); it names the "
            "folder of them all, in which they are 0, 1 …"
        )
    path = Path(named[0] or run_dir.unused("sweep")).absolute()
    if path.exists() and not (is_sweep(path) and configs[0].resume == "auto"):
        raise UserError(
            f"run_dir={path} exists; choose another, or go on with its runs by resume=auto"
        )
    clusters = [config.cluster for config in configs]
    if any(cluster != clusters[0] for cluster in clusters):
        raise UserError(
            "the runs of a sweep have one cluster section; start those with another by themselves"
        )
    return [
        dataclasses.replace(config, run_dir=str(path / str(at)))
        for at, config in enumerate(configs)
    ]


def begin(configs: list[Config]) -> Path:
    """Make the folder in which `place` put them."""
    path = Path(configs[0].run_dir or "").parent
    path.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path / INDEX, {"argv": sys.argv, "runs": len(configs)})
    return path


def is_sweep(path: Path) -> bool:
    return (path / INDEX).is_file()


def elements(path: Path) -> list[RunDir]:
    """The runs of a sweep that have begun or are queued, in their order."""
    found = [RunDir(f.parent) for f in path.glob("*/config.yaml") if f.parent.name.isdigit()]
    return sorted(found, key=lambda run: int(run.path.name))


def element(path: Path, index: str | None) -> RunDir:
    """The run folder that a job is for: `path`, or one in it for an element of an array."""
    return RunDir(path / index if index and is_sweep(path) else path)


def differing(configs: list[Config]) -> list[dict[str, str]]:
    """Of each configuration the settings, by their overrides, that are not the same in all.

    Where and whether they go on is not told. Where another file of a group is chosen, as by
    `method=full`, that says it; what only one of those files has is left out.
    """
    sides = [store.leaves(config) for config in configs]
    common = set.intersection(*(set(side) for side in sides)) - set(TOP_LEVEL)
    keys = [k for k in sides[0] if k in common and any(side[k] != sides[0][k] for side in sides)]
    return [{key.removesuffix(".name"): _word(side[key]) for key in keys} for side in sides]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
