"""Saves the page's settings as a Hydra experiment file, and loads them. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import yaml

from launcher.config import experiment, store
from launcher.errors import UserError
from launcher.folders import paths
from launcher.ui import form, override_syntax
from launcher.ui.form import HYDRA_GROUPS, FormCheck, Values
from launcher.ui.implied import with_implied
from launcher.ui.roots import NAME_PATTERN, Roots

FOLDER = "experiments"  # in the first root; Hydra expects the group's folder in it


def names(roots: Roots) -> list[str]:
    """Names of the experiment files in the first root and of those that come with Shardway."""
    files = [*_user_folder(roots).glob("*.yaml"), *_bundled_folder().glob("*.yaml")]
    return sorted({path.stem for path in files})


def save(roots: Roots, name: str, check: FormCheck) -> Path:
    """Write the settings that differ from those of the chosen files of conf/.

    Raises UserError if the name is invalid or already used, or if the settings cannot be composed.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"{name!r} is not a valid name of an experiment → letters, digits, '.', '_' and '-'"
        )
    if check.config is None:
        raise UserError(
            "the settings cannot be saved because they cannot be composed → fix the problems first"
        )
    path = roots.to_write(_user_folder(roots) / f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists → another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_to_yaml(name, check), encoding="utf-8")
    return path


def _to_yaml(name: str, check: FormCheck) -> str:
    assert check.config is not None
    files = form.default_files() | dict(
        pair for override in check.overrides if (pair := override.split("=", 1))[0] in HYDRA_GROUPS
    )
    chosen = {group: files[group] for group in HYDRA_GROUPS}
    unchanged = form.leaves_with(chosen)
    changed = {
        key: value
        for key, value in store.leaves(check.config).items()
        if (key not in unchanged or unchanged[key] != value) and "." in key
    }
    replaced = {
        group: file for group, file in chosen.items() if file != form.default_files()[group]
    }
    header = f"shardway train --config-dir {FOLDER} experiment={name}"
    return experiment.to_yaml(header, replaced, changed)


def load(roots: Roots, name: str) -> tuple[Values, str]:
    """The page's values and the lines of additional overrides from an experiment file.

    Raises UserError if the file does not exist or is not an experiment file.
    """
    own, bundled = _user_folder(roots) / f"{name}.yaml", _bundled_folder() / f"{name}.yaml"
    if not NAME_PATTERN.fullmatch(name) or not (own.is_file() or bundled.is_file()):
        raise UserError(
            f"experiment {name} does not exist; the experiments are {', '.join(names(roots))}"
        )
    path = own if own.is_file() else bundled
    try:
        with roots.open(own) if path == own else bundled.open("rb") as file:
            tree = dict(yaml.safe_load(file))
        defaults = tree.pop("defaults", [])
        pairs = [pair for entry in defaults if isinstance(entry, dict) for pair in entry.items()]
        overrides = [f"{key.removeprefix('override /')}={file}" for key, file in pairs]
        overrides += [
            f"{key}={override_syntax.format_value(value)}" for key, value in store.leaves_of(tree)
        ]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not an experiment file: {error}") from error
    values, more = form.apply_overrides(form.initial_values(), "", overrides)
    return _with_accumulation(with_implied(values), more, roots)


def _with_accumulation(values: Values, more: str, roots: Roots) -> tuple[Values, str]:
    """Replace a typed global batch size by accumulation steps if they are a whole number."""
    key = "training.global_batch_size="
    sizes = [line.removeprefix(key) for line in more.splitlines() if line.startswith(key)]
    check = form.check_form(values, more, roots)
    if not check.config or not check.world:
        return values, more
    training = check.config.training
    forwards, remainder = divmod(
        training.global_batch_size, check.world.size * training.micro_batch_size
    )
    if remainder or not sizes:
        return values, more
    lines = [line for line in more.splitlines() if not line.startswith(key)]
    return {**values, form.ACCUMULATION: str(forwards)}, "\n".join(lines)


def _user_folder(roots: Roots) -> Path:
    return roots.home / FOLDER / "experiment"


def _bundled_folder() -> Path:
    return paths.resource("conf") / "experiment"
