"""What was typed into the page as a Hydra experiment file, and back. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launcher import paths
from launcher.config import store
from launcher.errors import UserError
from launcher.ui import form, grammar
from launcher.ui.form import CHOSEN, Look, Values
from launcher.ui.places import NAME, Places

FOLDER = "experiments"  # in the first root; Hydra looks for the group in it
HEAD = "# @package _global_\n# shardway train --config-dir {folder} experiment={name}\n"


def names(places: Places) -> list[str]:
    """Of the files in the first root, and of those that ship with Shardway."""
    found = [*_folder(places).glob("*.yaml"), *_shipped().glob("*.yaml")]
    return sorted({path.stem for path in found})


def save(places: Places, name: str, look: Look) -> Path:
    """Write the settings that differ from those of the chosen files of conf/.

    Raises UserError for what cannot be a name, for one that is taken, and while nothing can be
    composed from what was typed.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of an experiment → letters, digits, '.', '_' and '-'")
    if look.config is None:
        raise UserError("what cannot be composed cannot be saved → mend what is said to be wrong")
    path = places.to_write(_folder(places) / f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists → another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(name, look), encoding="utf-8")
    return path


def _text(name: str, look: Look) -> str:
    assert look.config is not None
    files = form.defaults() | dict(
        pair for word in look.overrides if (pair := word.split("=", 1))[0] in CHOSEN
    )
    chosen = {group: files[group] for group in CHOSEN}
    before = form.leaves_with(chosen)
    changed: dict[str, Any] = {}
    for key, value in store.leaves(look.config).items():
        if (key not in before or before[key] != value) and "." in key:
            _put(changed, key.split("."), value)
    listed = [
        {f"override /{group}": file}
        for group, file in chosen.items()
        if file != form.defaults()[group]
    ]
    body = {"defaults": [*listed, "_self_"], **changed}
    return HEAD.format(folder=FOLDER, name=name) + yaml.safe_dump(
        body, sort_keys=False, allow_unicode=True
    )


def _put(tree: dict[str, Any], words: list[str], value: Any) -> None:
    for word in words[:-1]:
        tree = tree.setdefault(word, {})
    tree[words[-1]] = value


def load(places: Places, name: str) -> tuple[Values, str]:
    """The page's values, and the lines of further overrides, that an experiment file gives.

    Raises UserError for a file that is none.
    """
    own, shipped = _folder(places) / f"{name}.yaml", _shipped() / f"{name}.yaml"
    if not NAME.fullmatch(name) or not (own.is_file() or shipped.is_file()):
        raise UserError(f"experiment {name} is not there; there are {', '.join(names(places))}")
    path = places.to_read(own) if own.is_file() else shipped
    try:
        tree = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        listed = tree.pop("defaults", [])
        pairs = [pair for each in listed if isinstance(each, dict) for pair in each.items()]
        words = [f"{key.removeprefix('override /')}={file}" for key, file in pairs]
        words += [
            f"{_sign(key)}{key}={grammar.text_of(value)}" for key, value in store.leaves_of(tree)
        ]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no experiment file: {error}") from error
    values, more = form.apply(form.begun(), "", words)
    return _accumulated(values, more, places)


def _sign(key: str) -> str:
    """A plus before an entry of a setting that holds entries of any name."""
    *parents, _ = key.split(".")
    return "+" if grammar.kind_of(".".join(parents[:2])).startswith("dict[") else ""


def _accumulated(values: Values, more: str, places: Places) -> tuple[Values, str]:
    """The global batch as forwards a step, where it is a whole number of them."""
    key = "training.global_batch_size="
    sizes = [line.removeprefix(key) for line in more.splitlines() if line.startswith(key)]
    found = form.look(values, more, places)
    if not found.config or not found.world:
        return values, more
    training = found.config.training
    forwards, rest = divmod(
        training.global_batch_size, found.world.size * training.micro_batch_size
    )
    if rest or not sizes:
        return values, more
    lines = [line for line in more.splitlines() if not line.startswith(key)]
    return {**values, form.ACCUMULATION: str(forwards)}, "\n".join(lines)


def _folder(places: Places) -> Path:
    return places.home / FOLDER / "experiment"


def _shipped() -> Path:
    return paths.beside("conf") / "experiment"
