"""Compose a configuration from conf/ and overrides with Hydra. Imports no torch."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launcher.config import Config, overrides, store
from launcher.config.overrides import Implied
from launcher.config.secrets import masked_yaml, secret_names
from launcher.errors import UserError
from launcher.folders import paths

FOLDER_OPTIONS = ("--config-dir", "-cd", "--config-path", "-cp")
FOLDER_ARGUMENTS = {"config_dir", "config_path", "config_name"}


@dataclass(frozen=True)
class Files:
    """The files that are composed: the primary one, and a folder with more files of groups."""

    folder: str
    primary: str = "config"
    more: str | None = None


def compose_command_line() -> list[Config]:
    """The configurations that `sys.argv` asks for: one, or with --multirun one per combination.

    Raises UserError if Hydra or the schema refuses one. Exits after --help, --cfg and --info, which
    Hydra answers itself. In `sys.argv`, `•••` then stands for secrets.
    """
    register_resolvers()
    options, words = _split_command_line()
    given, unknown = get_args_parser().parse_known_args(options[1:])
    files = _files_of(given)
    asked = {name for name, value in vars(given).items() if value}
    try:
        words = complete(words, files, given.multirun)
        if asked <= FOLDER_ARGUMENTS and not unknown and not any(map(_is_for_hydra, words)):
            composed = [_compose_once(words, files)]
        else:
            composed = _run_hydra([*options, *words])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(hydra_message(error)) from error
    configs = [store.build(raw) for raw in composed]
    secrets = {name for config in configs for name in secret_names(config.cluster)}
    sys.argv = overrides.masked(sys.argv, secrets)  # it is recorded
    return configs


def compose(words: list[str]) -> Config:
    """The configuration that `shardway train` composes from these overrides; the rules are not
    checked.

    Raises ConfigError if the schema refuses it, UserError for a value that is missing, and Hydra's
    and OmegaConf's own errors.
    """
    register_resolvers()
    files = Files(str(paths.resource("conf")))
    return store.build(_compose_once(complete(words, files), files))


def _compose_once(words: list[str], files: Files) -> Any:
    """The plain mapping of one run. The schema checks it later.

    Hydra's program composes a run twice, the first time only to see whether it is a sweep.
    """
    with _opened(files) as program:
        raw = program.compose_config(
            files.primary, words, run_mode=RunMode.RUN, with_log_configuration=False
        )
        HydraConfig.instance().set_config(raw)  # for `${hydra:…}` in a file
        with open_dict(raw):
            del raw["hydra"]
        return OmegaConf.to_container(raw, resolve=True)


def _run_hydra(argv: list[str]) -> list[Any]:
    """The plain mappings of a sweep's runs; none where Hydra has answered (--help, --cfg)."""
    composed: list[Any] = []
    printed = io.StringIO()  # by --cfg and the like

    @hydra.main(version_base="1.3", config_path=str(paths.resource("conf")), config_name="config")
    def collect(raw: DictConfig) -> None:
        composed.append(OmegaConf.to_container(raw, resolve=True))

    original_argv = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise here instead of printing a stack and exiting
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        sys.argv = [
            *argv,
            "hydra.run.dir=.",  # Shardway creates the run folder, so Hydra must not create one
            f"hydra.sweep.dir={scratch}",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
        try:
            with redirect_stdout(printed):
                collect()
        finally:
            sys.argv = original_argv
            print(masked_yaml(printed.getvalue()), end="")
    if not composed:
        sys.exit(0)
    return composed


def _is_for_hydra(word: str) -> bool:
    """Whether an override sets Hydra itself, such as hydra.mode=MULTIRUN."""
    return re.match(r"[~+]*hydra[./@=]", word) is not None


@contextmanager
def _opened(files: Files) -> Iterator[Any]:
    """Hydra with the folders of `files` to compose from."""
    if files.more and not Path(files.more).is_dir():
        raise UserError(f"--config-dir {files.more} is not a folder")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=files.folder):
        program: Any = GlobalHydra.instance().hydra
        if files.more:
            loader = program.config_loader
            folders = loader.get_search_path()
            added = f"file://{Path(files.more).absolute()}"
            folders.prepend("command-line", added, SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(folders)
        yield program


def register_resolvers() -> None:
    """Register the resolvers of conf/."""
    resolvers: dict[str, Callable[..., Any]] = {
        "bundled": lambda name: str(paths.bundled(name)),
        "cache": lambda name: str(paths.cache() / name),
        # VALUE, or null if the other setting is set
        "unless_set": lambda other, value: value if other is None else None,
        "last_part": paths.last_part,  # of the path of a model, for its name
    }
    for name, resolve in resolvers.items():
        OmegaConf.register_new_resolver(name, resolve, replace=True)


def complete(words: list[str], files: Files, multirun: bool = False) -> list[str]:
    """`words` as Hydra accepts them, with the overrides that they imply.

    Raises UserError for a value that is missing, and Hydra's own errors.
    """
    words = overrides.prepared(words, multirun)
    return [
        *words,
        *(each.override for each in overrides.implied(words) if _applies(each, words, files)),
    ]


def _applies(implied: Implied, words: list[str], files: Files) -> bool:
    """Whether an implied choice of a file replaces only the default: nothing else chooses one.

    Raises UserError if that differs between the runs of a sweep.
    """
    if implied.replaces is None:
        return True
    with _opened(files) as program:
        loader = program.config_loader
        runs = itertools.product(*overrides.sweeps_of_groups(words, loader))
        applies = {_is_default(implied, loader, files.primary, list(run)) for run in runs}
    if len(applies) > 1:
        group = overrides.key_of(implied.override)
        raise UserError(
            f"{implied.setting} implies {implied.override}, but some runs of the sweep choose "
            f"another file of {group} → {group}=NAME"
        )
    return applies.pop()


def _is_default(implied: Implied, loader: Any, primary: str, words: list[str]) -> bool:
    """Whether the primary file chooses `implied.replaces`, and no other file chooses one."""
    group = overrides.key_of(implied.override)
    try:
        chosen = loader.compute_defaults_list(primary, words, RunMode.RUN).overrides
    except MissingConfigException:  # composing reports it, if no file names more folders
        return False
    return group not in chosen.override_choices and (
        group in chosen.known_choices and chosen.known_choices[group] == implied.replaces
    )


def _split_command_line() -> tuple[list[str], list[str]]:
    """The options of `sys.argv` with the program's name, and the overrides: argparse needs them in
    one place."""
    positions = [
        index
        for index, word in enumerate(sys.argv)
        if index
        and re.match(r"~|[+\w].*=", word, re.DOTALL)
        and sys.argv[index - 1] not in FOLDER_OPTIONS  # --config-dir A=B: a folder, no override
    ]
    options = [word for index, word in enumerate(sys.argv) if index not in positions]
    words = [sys.argv[index] for index in positions]
    return options, words


def _files_of(given: argparse.Namespace) -> Files:
    """The files that Hydra composes with the options of a command line."""
    folder = Path(__file__).parent / (given.config_path or paths.resource("conf"))
    return Files(str(folder), given.config_name or "config", given.config_dir)


def hydra_message(error: Exception) -> str:
    """The message of a Hydra or OmegaConf error without boilerplate, with the nearest setting."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(line for line in lines if not line.startswith(("object_type", "full_key")))
    unknown = re.match(r"Could not override '([^']+)'", message)
    return store.describe_unknown(unknown[1]) if unknown else message
