"""Which files of a model folder are copied with its weights: all but other weights, the state of a
trainer and hidden files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher.folders.extended_model import RECORD as NEW_TOKENS
from launcher.folders.file_names import (
    ARCHIVES,
    HIDDEN,
    OF_ADAPTERS,
    OF_TRAINERS,
    WEIGHT_FILES,
    matches,
)
from launcher.folders.json_file import DamagedFile, is_object, list_of, read_json
from launcher.folders.model import CONFIG
from launcher.folders.tensor_entries import is_inside
from launcher.folders.unreadable import is_file

EXPORT_MANIFEST = "consolidation_manifest.json"
MODULES = "modules.json"  # of sentence-transformers: its modules, some of which have own weights
MAX_BYTES = 10**8  # of a file: larger ones are data
MAX_FILES = 1000  # of a subfolder
# What an export writes itself: names of files → why they are not copied.
WRITTEN = {
    (CONFIG, EXPORT_MANIFEST, NEW_TOKENS): "written anew",
    ("*.index.json", "*.index.*.json"): "of other weights",
    ("Modelfile",): "--modelfile writes one",
}
# Of a trainer's folder, whose other files are not the model's, these are.
DESCRIBING = (*("*.json", "*.jinja", "*.txt", "*.py", "*.md"), "LICENSE*", "NOTICE*")
# What stays where it is: reason → names of files and subfolders.
LEFT = {
    "hidden": HIDDEN,
    "of an adapter": OF_ADAPTERS,
    "of a trainer": OF_TRAINERS,
    "archives": ARCHIVES,
    "other weights": WEIGHT_FILES,
}


@dataclass
class ModelFiles:
    """What of a model folder is copied, and what is not."""

    copied: dict[str, Path] = field(default_factory=dict)  # path below the folder → file
    left: dict[str, str] = field(default_factory=dict)  # the same → why; a folder ends in /


def files_of(folder: Path) -> ModelFiles:
    """The files of a model folder, those of its subfolders included. Links to nothing are among
    them.

    A subfolder with weights is another model, and stays, unless it is one of the modules that
    modules.json lists.
    """
    result, modules = ModelFiles(), _modules(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            _add_subfolder(result, path, path.name in modules)
        elif is_file(path):
            _add(result, path.name, path)
    return result


def is_describing(path: Path) -> bool:
    """Whether a file of a trainer's folder describes the model, by its name."""
    return is_file(path) and matches(path.name, DESCRIBING) and _reason_at_top(path.name) is None


def _add(result: ModelFiles, name: str, path: Path) -> None:
    if reason := _reason(path.name) if "/" in name else _reason_at_top(name):
        result.left[name] = reason
    elif path.exists() and path.stat().st_size > MAX_BYTES:
        result.left[name] = f"larger than {MAX_BYTES // 10**6} MB"
    else:
        result.copied[name] = path


def _reason(name: str) -> str | None:
    return next((reason for reason, patterns in LEFT.items() if matches(name, patterns)), None)


def _reason_at_top(name: str) -> str | None:
    """As `_reason`, for a file directly in the model's folder."""
    written = (reason for patterns, reason in WRITTEN.items() if matches(name, patterns))
    return next(written, None) or _reason(name)


def _add_subfolder(result: ModelFiles, path: Path, is_module: bool) -> None:
    if reason := _reason(path.name):
        result.left[f"{path.name}/"] = reason
        return
    files = list(_files_below(path))
    if len(files) > MAX_FILES:
        result.left[f"{path.name}/"] = f"more than {MAX_FILES:,} files"
    elif is_module:
        result.copied |= {f"{path.name}/{file.relative_to(path)}": file for file in files}
    elif any(matches(file.name, WEIGHT_FILES) for file in files):
        result.left[f"{path.name}/"] = "other weights"
    else:
        for file in files:
            _add(result, f"{path.name}/{file.relative_to(path)}", file)


def _files_below(folder: Path) -> Iterator[Path]:
    """Up to one more than MAX_FILES files, in order."""
    count = 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if is_file(path := Path(parent, name)):
                yield path
                count += 1
            if count > MAX_FILES:
                return


def _modules(folder: Path) -> set[str]:
    """The subfolders that modules.json lists. Raises UserError if it is of another form."""
    if not (file := folder / MODULES).is_file():
        return set()
    content = read_json(file)
    if not list_of(is_object)(content):
        raise DamagedFile(file, "is damaged: it is not a list of modules")
    paths = (module.get("path") for module in content)
    return {path for path in paths if isinstance(path, str) and is_inside(path)}
