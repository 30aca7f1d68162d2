"""Finds the base of an adapter, and chooses an adapter of a folder that contains several."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders.adapter import SETTINGS, read_settings
from launcher.folders.kind import Kind, kinds_of
from launcher.folders.model import CONFIG, whole_model_folder
from launcher.folders.unknown_source import explain
from launcher.io.adapter_config import check_expressible

INITIAL = ("*_init", "init*")  # folders of adapters that were saved before training


@dataclass(frozen=True)
class Base:
    """What an adapter was trained on."""

    folder: Path  # the model
    adapters: tuple[Path, ...] = ()  # that were merged into it before, in this order
    replaced: Path | None = None  # the adapter that the settings name, in whose place it is


def base_of_adapter(settings: Path, base: str | None, above: tuple[Path, ...] = ()) -> Base:
    """What the adapter with this adapter_config.json was trained on. Its base may be an adapter,
    which was merged into its own base first.

    `base`: the base, instead of the one that the settings name. `above`: the adapters that were
    trained on this one. Raises UserError if the base does not exist.
    """
    config = read_settings(settings)
    check_expressible(settings, config)
    folder = _base_folder(base, config.get("base_model_name_or_path"), config.get("revision"))
    if _is_adapter(folder):
        if folder.resolve() == settings.parent.resolve():
            raise UserError(
                f"the base model {folder} is the adapter itself → name the model that it was "
                "trained on with --base FOLDER"
            )
        if folder in above:
            raise UserError(
                f"{settings} names {folder} as its base, which was trained on this adapter → name "
                "the model with --base FOLDER"
            )
        below = base_of_adapter(folder / SETTINGS, None, (*above, folder))
        return Base(below.folder, (*below.adapters, folder))
    recorded = config.get("base_model_name_or_path")
    named = Path(recorded) if base and isinstance(recorded, str) and recorded else None
    return Base(_checked(folder), replaced=named if named and _is_adapter(named) else None)


def find_base(base: str | None, recorded: Any, revision: str | None) -> Path:
    """The folder of the base model: `base`, otherwise the one that the training recorded. Raises
    UserError if there is none."""
    return _checked(_base_folder(base, recorded, revision))


def base_config(base: str | None, recorded: Any) -> Path | None:
    """The config.json of the base that an adapter is for, if it is on this machine."""
    name = base or recorded
    file = Path(name) / CONFIG if isinstance(name, str) and name else None
    return file if file is not None and file.is_file() else None


def named_adapters(folder: Path) -> list[str]:
    """The names of the adapters in `folder`: PEFT saves each that is not "default" in a folder of
    its name."""
    found = sorted(file.parent.name for file in folder.glob(f"*/{SETTINGS}"))
    return [name for name in found if not any(fnmatch(name, each) for each in INITIAL)]


def choose_adapter(folder: Path, name: str | None) -> Path:
    """The folder of the adapter `name`, which is in `folder`; `folder` itself if there is only one
    adapter, or none. Raises UserError if one has to be chosen, or if `name` is not among
    them."""
    found = named_adapters(folder)
    listed = ", ".join(found)
    kinds = kinds_of(folder)
    if name is None:
        if found and not kinds:
            raise UserError(
                f"SOURCE {folder} contains the adapters {listed} → choose one of them with "
                f"--adapter-name {found[0]}"
            )
        return folder
    if name in found:
        is_whole = any((folder / name).glob("adapter_model.*"))
        return folder / name if is_whole else folder  # a state of both may be in the folder
    if not {Kind.RUN, Kind.CHECKPOINT}.isdisjoint(kinds) or (Kind.ADAPTER in kinds and not found):
        raise UserError(
            f"--adapter-name {name}: {folder} contains a single adapter → leave the option out"
        )
    if found:
        raise UserError(
            f"--adapter-name {name}: {folder} contains no such adapter, but {listed} → one of them"
        )
    return folder  # the state of a model may contain it


def _base_folder(base: str | None, recorded: Any, revision: str | None) -> Path:
    name = base or recorded
    if not isinstance(name, str | None):
        raise UserError(f"base_model_name_or_path={name!r} is not a name; add --base FOLDER")
    if not name:
        raise UserError("the adapter does not name its base model; add --base FOLDER")
    return whole_model_folder(name, None if base else revision)


def _is_adapter(folder: Path) -> bool:
    return next(iter(kinds_of(folder)), None) is Kind.ADAPTER


def _checked(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        reason = explain(folder) if folder.is_dir() else "does not exist"
        raise UserError(f"the base model {folder} {reason}; name its folder with --base FOLDER")
    return folder
