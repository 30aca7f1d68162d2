"""Where files that ship with the code are, in a checkout, an editable install and a wheel."""

from __future__ import annotations

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """The folder or file `name` (`conf`, `slurm` or `constraints.txt`).

    A wheel contains it inside the package, a checkout next to the package. Raises FileNotFoundError
    if it is in neither place.
    """
    for candidate in (PACKAGE / name, PACKAGE.parent / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{name} is neither in {PACKAGE} nor next to it: reinstall shardway")


def bundled(name: str) -> Path:
    """A file that ships inside the package, such as `demo/train.jsonl`."""
    return PACKAGE / name


def templates() -> dict[str, Path]:
    """The chat templates that ship inside the package, by name."""
    return {path.stem: path for path in sorted((PACKAGE / "templates").glob("*.jinja"))}


def cache() -> Path:
    """The folder for downloaded models and tokenized data.

    `SHARDWAY_CACHE` if set, otherwise `XDG_CACHE_HOME/shardway`, otherwise `~/.cache/shardway`.
    """
    if chosen := os.environ.get("SHARDWAY_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "shardway"


def last_part(path: str) -> str:
    """The last part of a path or hub id as a file name: without what a shell would interpret."""
    name = Path(os.path.abspath(path)).name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
