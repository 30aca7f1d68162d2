"""`shardway rules`: what every configuration must keep, and each rule by an example."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
from contextlib import chdir
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from launcher import paths, train
from launcher.config import Config, store
from launcher.config.checks import RULES
from launcher.config.rule import Rule
from launcher.errors import UserError

ABOUT = """\
Print the rules between settings, or explain one by an example: what it asks, a command that breaks
it, what is said then, and the command that mends it.

    shardway rules                    every rule, and what it asks
    shardway rules batch-divides      one of them, explained

`shardway train` holds a configuration against all of them before anything starts. What it refuses
ends in the id of the rule, in brackets. Limits of single settings: docs/configuration.md
"""
WIDTH = 96


def main() -> None:
    """The command line. Exits with 2 where there is no such rule."""
    parser = argparse.ArgumentParser(
        prog="shardway rules",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("id", nargs="?", metavar="ID", help="the rule to explain")
    wanted = parser.parse_args().id
    try:
        print(
            explain(find(wanted)) if wanted else table(shutil.get_terminal_size((100, 0)).columns)
        )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)


def table(width: int) -> str:
    """Every rule and what it asks, in two columns."""
    indent = max(len(rule.id) for rule in RULES) + 2
    return "\n".join(
        textwrap.fill(
            rule.about,
            max(width, indent + 40),
            initial_indent=rule.id.ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for rule in RULES
    )


def find(id: str) -> Rule:
    """The rule of that id. Raises UserError with the nearest ones."""
    ids = [rule.id for rule in RULES]
    if id in ids:
        return RULES[ids.index(id)]
    near = [other for other in ids if id in other] or difflib.get_close_matches(id, ids)
    hint = f"did you mean {' or '.join(near)}?" if near else "shardway rules lists them all"
    raise UserError(f"{id} is no rule; {hint}")


def explain(rule: Rule) -> str:
    """The rule by its example, which is composed and refused here and now."""
    example = rule.example
    overrides = shlex.split(example.overrides)
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch, chdir(scratch):
        make(example.files)
        config = compose(overrides)
        world = example.world(config)
        sentence, fix = rule.sentence(config, world), rule.fix(config, world)
    machine = f" on a machine {example.machine()}" if example.machine() else ""
    changes, first = overrides_of(fix), fix.partition(", or ")[0]
    parts = [
        f"{rule.id}: {rule.about}",
        f"This breaks it{machine}:\n{_command(overrides)}",
        f"where these files are:\n{_listed(example.files)}" if example.files else "",
        f"and is refused with:\n{_filled(sentence)}\n{_filled(f'→ {fix}')}",
        f"This mends it:\n{_command(mended(overrides, changes)) if changes else _filled(first)}",
    ]
    return "\n\n".join(part.replace("\n", "\n    ") for part in parts if part)


def make(files: dict[str, str]) -> None:
    """Write the files of an example into the current folder."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")


def compose(overrides: list[str]) -> Config:
    """The configuration that `shardway train` makes of `overrides`, not yet held against rules."""
    train.register_resolvers()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(paths.beside("conf"))):
        composed: Any = hydra.compose("config", overrides)
    return store.build(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]


def overrides_of(fix: str) -> list[str]:
    """The overrides of a fix, those of its first alternative; none where it is in words."""
    words = fix.partition(", or ")[0].split()
    return [word for word in words if re.match(r"[+~]?[a-z][\w./]*=", word)]


def mended(overrides: list[str], changes: list[str]) -> list[str]:
    """`overrides` with `changes`, each in the place of the one with its key."""
    left = {_key(change): change for change in changes}
    return [left.pop(_key(word), word) for word in overrides] + list(left.values())


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _command(overrides: list[str]) -> str:
    return f"shardway train {shlex.join(overrides)}"


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _listed(files: dict[str, str]) -> str:
    indent = max(map(len, files)) + 2
    return "\n".join(name.ljust(indent) + (files[name] or "(empty)") for name in files)


if __name__ == "__main__":
    main()
