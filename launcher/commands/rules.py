"""`shardway rules`: list the rules between settings, or explain one with an example."""

from __future__ import annotations

import difflib
import shlex
import shutil
import tempfile
import textwrap
from contextlib import chdir
from pathlib import Path

from launcher.commands.arguments import command_parser
from launcher.config.compose import compose
from launcher.config.overrides import apply_changes, overrides_in
from launcher.config.rules.rule import Rule
from launcher.config.rules.table import RULES
from launcher.errors import UserError

ABOUT = """\
Print the rules between settings, or explain one with an example: what it requires, a command that
breaks it, the message, and the command that fixes it.

    shardway rules                    every rule and what it requires
    shardway rules batch-divides      one rule, explained

`shardway train` checks a configuration against all rules before anything starts. The message of a
broken rule ends with its id in brackets. Limits of single settings: docs/configuration.md
"""
WIDTH = 96


def main() -> None:
    parser = command_parser("rules", ABOUT)
    parser.add_argument("id", nargs="?", metavar="ID", help="the rule to explain")
    rule_id = parser.parse_args().id
    if rule_id:
        print(explain(find_rule(rule_id)))
    else:
        print(format_table(shutil.get_terminal_size((100, 0)).columns))


def format_table(width: int) -> str:
    """Every rule and what it requires, in two columns."""
    indent = max(len(rule.id) for rule in RULES) + 2
    return "\n".join(
        textwrap.fill(
            rule.requirement,
            max(width, indent + 40),
            initial_indent=rule.id.ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for rule in RULES
    )


def find_rule(rule_id: str) -> Rule:
    """The rule with this id. Raises UserError with similar ids."""
    ids = [rule.id for rule in RULES]
    if rule_id in ids:
        return RULES[ids.index(rule_id)]
    similar = [each for each in ids if rule_id in each] or difflib.get_close_matches(rule_id, ids)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "shardway rules lists them all"
    raise UserError(f"{rule_id} is not a rule; {hint}")


def explain(rule: Rule) -> str:
    """The rule with its example, whose message comes from composing and checking it now."""
    example = rule.example
    overrides = shlex.split(example.overrides)
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch, chdir(scratch):
        write_files(example.files)
        config = compose(overrides)
        world = example.world(config)
        message, fix = rule.message(config, world), rule.fix(config, world)
    machine = example.describe_machine()
    on_machine = f" on a machine {machine}" if machine else ""
    changes, first_fix = overrides_in(fix), fix.partition(", or ")[0]
    fixed = _command(apply_changes(overrides, changes)) if changes else _fill(first_fix)
    parts = [
        f"{rule.id}: {rule.requirement}",
        f"This breaks it{on_machine}:\n{_command(overrides)}",
        f"with these files:\n{_list_files(example.files)}" if example.files else "",
        f"and is refused with:\n{_fill(message)}\n{_fill(f'→ {fix}')}",
        f"This fixes it:\n{fixed}",
    ]
    return "\n\n".join(part.replace("\n", "\n    ") for part in parts if part)


def write_files(files: dict[str, str]) -> None:
    """Write the files of an example (path → content) to the working directory."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")


def _command(overrides: list[str]) -> str:
    return f"shardway train {shlex.join(overrides)}"


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _list_files(files: dict[str, str]) -> str:
    indent = max(map(len, files)) + 2
    return "\n".join(name.ljust(indent) + _shown(content) for name, content in files.items())


def _shown(content: str) -> str:
    """The content of a file; binary content only as its size."""
    return f"({len(content)} bytes)" if "\0" in content else content or "(empty)"
