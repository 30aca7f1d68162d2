"""The schema and the rules in words: docs/configuration.md.

python -m launcher.config.reference --write docs/configuration.md
python -m launcher.config.reference --check docs/configuration.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from launcher.config import SECTIONS
from launcher.config.checks import RULES
from launcher.config.rule import Example
from launcher.config.setting import limits

HEAD = """# Configuration reference

Generated from `launcher/config/` by `make reference`; `make check` fails when it is out of date.
Set a value with `section.setting=value`, choose a file of a group with `group=name`.
"""

TAIL = """## run_dir, resume, resume_force

`run_dir`: the run folder, which must be new. `null` is `runs/<time>-<model>-<method>`.
`resume`: `none` begins; `auto` goes on in `run_dir` from its newest whole checkpoint, or begins
where there is none; the path of a checkpoint or a run begins a new run from there.
`resume_force=true` goes on even where the configuration or the rows differ in what is learnt.

## Rules between settings

Every broken rule is reported at once, before anything starts, with the override that mends it.
`shardway rules ID` explains one by its example: what is said of it, and the command that mends it.

"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.config.reference")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", type=Path, metavar="FILE", help="write the reference")
    choice.add_argument("--check", type=Path, metavar="FILE", help="fail when FILE is out of date")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(reference(), encoding="utf-8")
    elif arguments.check.read_text(encoding="utf-8") != reference():
        print(f"{arguments.check} is out of date: run make reference", file=sys.stderr)
        sys.exit(1)


def reference() -> str:
    """docs/configuration.md."""
    parts = [HEAD]
    for section, schema in SECTIONS.items():
        parts.append(f"## {section}\n")
        if not isinstance(schema, dict):
            parts.append(_table(section, schema))
            continue
        choices: dict[type, list[str]] = {}  # schemas that several names share stand once
        for name, each in schema.items():
            choices.setdefault(each, []).append(name)
        for each, names in choices.items():
            parts.append("### " + ", ".join(f"`{section}={name}`" for name in names) + "\n")
            parts.append(f"{each.__doc__}\n")
            parts.append(_table(section, each))
    parts.append(TAIL + rules())
    return "\n".join(parts)


def rules() -> str:
    """The rule table as Markdown."""
    rows = "\n".join(f"| `{r.id}` | {r.about} | {_example(r.example)} |" for r in RULES)
    return f"| rule | what it asks | broken by |\n|---|---|---|\n{rows}\n"


def _example(example: Example) -> str:
    files = "with files that `shardway rules ID` shows" if example.files else ""
    return " ".join(filter(None, (f"`{example.overrides}`", example.machine(), files)))


def _table(section: str, schema: type) -> str:
    rows = [
        f"| `{section}.{field.name}` | {_default(field)} | {limits(field)} "
        f"| {field.metadata['help']} |"
        for field in dataclasses.fields(schema)
        if field.name != "name" or not field.metadata["help"].startswith("the ")
    ]
    if not rows:
        return ""
    head = "| setting | default | limits | meaning |\n|---|---|---|---|"
    return "\n".join([head, *rows]) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(field.default)}`"


if __name__ == "__main__":
    main()
