"""Experiment files: chosen files of the groups, and values. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.config import SECTIONS, overrides
from launcher.errors import UserError


def to_yaml(header: str, chosen: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """An experiment file.

    Args:
        header: a comment with the command that uses the file.
        chosen: the file of each group that is not the default one.
        values: by dotted name.
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        part = tree
        for section in sections:
            part = part.setdefault(section, {})
        part[name] = value
    defaults = [{f"override /{group}": file} for group, file in chosen.items()]
    body = {"defaults": [*defaults, "_self_"], **tree}
    text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
    return f"# @package _global_\n# {header}\n{text}"


def write(path: Path, words: list[str]) -> None:
    """Write overrides, none of which adds or removes a key, as a new experiment file.

    Raises UserError if the file exists, or would not be an experiment for Hydra.
    """
    if path.suffix != ".yaml":
        raise UserError(f"{path} is no experiment for Hydra → {path.with_suffix('.yaml')}")
    if path.exists():
        raise UserError(f"{path} exists → name a new file")
    parsed = {each.key_or_group: each.value() for each in overrides.parse(words)}
    chosen = {key: str(each) for key, each in parsed.items() if key in SECTIONS}
    values: dict[str, Any] = {key: each for key, each in parsed.items() if key not in chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(_command(path), chosen, values), encoding="utf-8")


def _command(path: Path) -> str:
    """How `shardway train` uses the file: Hydra looks for experiment/NAME.yaml in a folder."""
    folder = path.parent.parent if path.parent.name == "experiment" else None
    place = f"--config-dir {folder} " if folder else ""
    return f"shardway train {place}experiment={path.stem}"
