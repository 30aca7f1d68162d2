"""The configurations that the README.md of a data set lists: which files belong to which split.

The format: https://huggingface.co/docs/hub/datasets-manual-configuration
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import UserError

FILE_NAME = "README.md"
DEFAULT_NAME = "default"
DEFAULT_SPLIT = "train"  # of files that are listed without a split

Patterns = dict[str, list[str]]  # by split: globs of paths in the folder


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of `configs:` in the YAML head of README.md, by name; empty if there is none.

    Raises UserError if they have another format.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    match = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", text, re.DOTALL)
    if not match or not re.search(r"^configs:", match[1], re.MULTILINE):
        return {}
    try:
        entries = yaml.safe_load(match[1])["configs"] or []
        return {str(entry["config_name"]): entry for entry in entries}
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise _bad_format(file, "configs:", "a list of entries with config_name") from error


def choose_config(folder: Path, configs: dict[str, dict[str, Any]], name: str | None) -> str:
    """The configuration called `name`; without a name the only one or the default. Raises UserError
    if there is none."""
    names, first = ", ".join(configs), next(iter(configs), None)
    if name is not None:
        if name not in configs:
            raise UserError(f"data.subset={name} is not in {folder / FILE_NAME} → one of {names}")
        return name
    defaults = [each for each, entry in configs.items() if entry.get("default") is True]
    defaults += [DEFAULT_NAME] if DEFAULT_NAME in configs else []
    if not defaults and len(configs) > 1:
        raise UserError(
            f"data.path={folder} has several configurations: {names} → data.subset={first}"
        )
    return [*defaults, *configs][0]


def read_patterns(folder: Path, entry: dict[str, Any]) -> Patterns:
    """The globs of each split of a configuration; empty if it lists no files. Raises UserError if
    they have another format."""
    listed = entry.get("data_files") or []
    if isinstance(listed, dict):
        listed = [{"split": split, "path": globs} for split, globs in listed.items()]
    patterns: Patterns = {}
    for each in listed if isinstance(listed, list) else [listed]:
        has_split = isinstance(each, dict)
        split, globs = (each.get("split"), each.get("path")) if has_split else (DEFAULT_SPLIT, each)
        globs = [globs] if isinstance(globs, str) else globs
        is_list = isinstance(globs, list) and all(isinstance(each, str) for each in globs)
        if not isinstance(split, str) or not is_list:
            expected = "globs, or a list of split and path"
            raise _bad_format(folder / FILE_NAME, "data_files:", expected)
        patterns.setdefault(split, []).extend(globs)
    return patterns


def _bad_format(file: Path, key: str, expected: str) -> UserError:
    return UserError(f"{file}: {key} is not {expected}; correct it, or name the files with a glob")


def data_folder(folder: Path, entry: dict[str, Any]) -> Path:
    """The folder that the globs of a configuration start from. Raises UserError if it lies outside
    `folder`."""
    name = str(entry.get("data_dir") or ".")
    _refuse_outside(folder, name)
    return folder / name


def match(folder: Path, patterns: list[str]) -> set[Path]:
    """The files and folders in `folder` that `patterns` name. Raises UserError for a pattern that
    leads out of it."""
    found: set[Path] = set()
    for pattern in patterns:
        _refuse_outside(folder, pattern)
        found |= {folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)}
    return found


def _refuse_outside(folder: Path, path: str) -> None:
    if "://" in path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(
            f"{FILE_NAME} lists {path}, which is not in {folder}; name the file as data.path"
        )
