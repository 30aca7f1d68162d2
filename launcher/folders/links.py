"""Links in a folder that may have come from somebody else: no file in it is opened through one that
leads out of it, for reading or for writing.

The folder itself may be a link, and links inside it may lead to other places inside it. The files
of a snapshot in the hub's cache (models--NAME/snapshots/COMMIT) are links to models--NAME/blobs.
Hard links cannot be told from files, and a link that is put there after the check is followed.
Imports no torch.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from launcher.folders.json_file import DamagedFile

CHECKPOINT = re.compile(r"step-[0-9]{6,}")  # a checkpoint's folder
HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")  # a folder in the hub's cache


class LeadsOut(DamagedFile):
    """A link that leads out of the folder it is in."""

    def __init__(self, link: Path, folder: Path, target: str) -> None:
        super().__init__(
            link,
            f"is a link that leads out of {folder}, to {target} → if you trust it, replace the "
            "link by what it leads to",
        )


def inside(folder: Path, *names: str) -> Path:
    """The path of a file or folder below `folder`, which may not exist.

    Raises LeadsOut if it leads out of `folder`.
    """
    path = folder
    for part in Path(*names).parts:
        path = path / part
        may_leave = part in ("..", os.sep) or os.path.islink(path)
        if may_leave and not _is_below(target := _resolve(path), folder):
            raise LeadsOut(path, folder, target)
    return path


def check_tree(folder: Path) -> None:
    """Raises LeadsOut if a link anywhere in `folder` leads out of it."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                inside(folder, str(path.relative_to(folder)))


def check_part(path: Path) -> None:
    """Raises LeadsOut if `path` is a part of a checkpoint (`step-000500/adapter`) and leads out."""
    if CHECKPOINT.fullmatch(path.absolute().parent.name):
        inside(path.absolute().parent, path.name)


def _resolve(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except RecursionError:  # a thousand links, each to the next one
        return "more links than a system follows"


def _is_below(resolved: str, folder: Path) -> bool:
    top = Path(os.path.realpath(folder))
    # A snapshot in the hub's cache consists of files in the folder of its repository.
    repositories = (
        repository
        for snapshots, repository in itertools.pairwise(top.parents)
        if snapshots.name == "snapshots" and HUB_REPOSITORY.fullmatch(repository.name)
    )
    return Path(resolved).is_relative_to(next(repositories, top))
