"""Where the files beside the code are: in a checkout, an editable install and a wheel alike."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def beside(name: str) -> Path:
    """The folder or file `name` (`conf`, `slurm`, `constraints.txt`).

    A wheel carries it inside the package, a checkout beside the package.
    """
    for candidate in (PACKAGE / name, PACKAGE.parent / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{name} is neither in {PACKAGE} nor beside it: reinstall shardway")


def bundled(name: str) -> Path:
    """A file that ships inside the package, such as `demo/train.jsonl`."""
    return PACKAGE / name


def templates() -> dict[str, Path]:
    """The chat templates that ship inside the package, by name."""
    return {path.stem: path for path in sorted((PACKAGE / "templates").glob("*.jinja"))}


def cache() -> Path:
    """Where fetched models and tokenised data are kept.

    `SHARDWAY_CACHE` if set, else `XDG_CACHE_HOME/shardway`, else `~/.cache/shardway`.
    """
    if chosen := os.environ.get("SHARDWAY_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "shardway"


def picture_at(output: Path | None, name: str, overwrite: bool) -> Path:
    """Where a picture goes: `output`, or `name` here, with a number where that is taken.

    Raises UserError where `output` exists (unless `overwrite`), or its folder does not.
    """
    usual = Path(name)
    if output is None:
        numbered = (usual.with_stem(f"{usual.stem}-{number}") for number in range(2, 1000))
        return next(path for path in (usual, *numbered) if not path.exists())
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output {output} is no picture → a name in .png, .svg or .pdf")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists → another --output, or --overwrite")
    if not output.parent.is_dir():
        raise UserError(f"the folder of --output {output} is not there → make it, or name another")
    return output
