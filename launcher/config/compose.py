"""Compose a configuration from conf/ and overrides with Hydra. Imports no torch."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.config import Config, store
from launcher.errors import UserError
from launcher.folders import paths


def compose_command_line() -> list[Config]:
    """The configurations that `sys.argv` asks for: one, or with --multirun one per combination.

    Raises UserError if Hydra or the schema refuses one. Exits after --help, --cfg and --info, which
    Hydra answers itself.
    """
    composed: list[Any] = []  # plain mappings; the schema checks them outside Hydra's job

    @hydra.main(version_base="1.3", config_path=str(paths.resource("conf")), config_name="config")
    def collect(raw: DictConfig) -> None:
        composed.append(OmegaConf.to_container(raw, resolve=True))

    register_resolvers()
    original_argv = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise here instead of printing a stack and exiting
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        _prepend_overrides(
            "hydra.run.dir=.",  # Shardway creates the run folder, so Hydra must not create one
            f"hydra.sweep.dir={scratch}",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        )
        try:
            collect()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(hydra_message(error)) from error
        finally:
            sys.argv = original_argv
    if not composed:
        sys.exit(0)
    return [store.build(raw) for raw in composed]


def compose(overrides: list[str]) -> Config:
    """The configuration that `shardway train` composes from `overrides`; the rules are not checked.

    Raises ConfigError if the schema refuses it, and Hydra's and OmegaConf's own errors.
    """
    register_resolvers()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(paths.resource("conf"))):
        composed: Any = OmegaConf.to_container(hydra.compose("config", overrides), resolve=True)
    return store.build(composed)


def register_resolvers() -> None:
    """Register `${bundled:…}` and `${cache:…}`, which stand for paths in conf/."""
    OmegaConf.register_new_resolver("bundled", lambda name: str(paths.bundled(name)), replace=True)
    OmegaConf.register_new_resolver("cache", lambda name: str(paths.cache() / name), replace=True)


def _prepend_overrides(*defaults: str) -> None:
    """Insert `defaults` before the user's overrides, which win, and move all overrides behind the
    options: argparse needs them in one place."""
    positions = [
        index
        for index, word in enumerate(sys.argv)
        if index
        and re.match(r"[+~\w]", word)
        and "=" in word
        and not sys.argv[index - 1].startswith("--c")  # --config-dir A=B: a folder, no override
    ]
    options = [word for index, word in enumerate(sys.argv) if index not in positions]
    overrides = [sys.argv[index] for index in positions]
    # Without --multirun a comma is not a sweep: data.name=a,b is a list.
    if not {"--multirun", "-m"} & {*options}:
        overrides = [re.sub(r"^data\.name=([\w.,-]+)$", r"data.name='\1'", o) for o in overrides]
    sys.argv = [*options, *defaults, *overrides]


def hydra_message(error: Exception) -> str:
    """The message of a Hydra or OmegaConf error without boilerplate, with the nearest setting."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(line for line in lines if not line.startswith(("object_type", "full_key")))
    unknown = re.match(r"Could not override '([^']+)'", message)
    return store.describe_unknown(unknown[1]) if unknown else message


def overrides_in(fix: str) -> list[str]:
    """The overrides in the first alternative of a rule's fix; empty if it is plain text."""
    words = fix.partition(", or ")[0].split()
    return [word for word in words if re.match(r"[+~]?[a-z][\w./]*=", word)]


def apply_changes(overrides: list[str], changes: list[str]) -> list[str]:
    """`overrides` with `changes`: each replaces the override of the same key, or is appended."""
    remaining = {_key(change): change for change in changes}
    return [remaining.pop(_key(word), word) for word in overrides] + list(remaining.values())


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
