"""Generate docs/configuration.md from the schemas and the rules.

python -m launcher.config.reference --write docs/configuration.md
python -m launcher.config.reference --check docs/configuration.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from launcher.config import SECTIONS
from launcher.config.rules.rule import Example
from launcher.config.rules.table import RULES
from launcher.config.schema.setting import limits

HEAD = """# Configuration reference

Generated from `launcher/config/` by `make reference`; `make check` fails when it is out of date.
Set a value with `section.setting=value`. Choose a file of a group with `group=name`.
"""

TAIL = """## run_dir, resume, resume_force

* `run_dir`: the run folder, which must be new. `null` means `runs/<time>-<model>-<method>`.
* `resume`: `none` starts a new training. `auto` resumes the run in `run_dir` from its newest valid
  checkpoint, or starts it if there is none. The path of a checkpoint or a run starts a new run from
  that checkpoint.
* `resume_force=true` resumes even if settings or rows that change the training differ.

## Rules between settings

All broken rules are reported at once, before anything starts, with the overrides that fix them.
`shardway rules ID` explains a rule with an example: a command that breaks it, the message, and the
command that fixes it.

"""


def main() -> None:
    """Write the reference, or exit with status 1 if the file is out of date."""
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
    """The content of docs/configuration.md."""
    parts = [HEAD]
    for section, schema in SECTIONS.items():
        parts.append(f"## {section}\n")
        if not isinstance(schema, dict):
            parts.append(_table(section, schema))
            continue
        names_by_schema: dict[type, list[str]] = {}  # several names may share a schema
        for name, choice in schema.items():
            names_by_schema.setdefault(choice, []).append(name)
        for choice, names in names_by_schema.items():
            parts.append("### " + ", ".join(f"`{section}={name}`" for name in names) + "\n")
            parts.append(f"{inspect.getdoc(choice)}\n")
            parts.append(_table(section, choice))
    parts.append(TAIL + rules())
    return "\n".join(parts)


def rules() -> str:
    """The rule table as Markdown."""
    rows = "\n".join(f"| `{r.id}` | {r.requirement} | {_example(r.example)} |" for r in RULES)
    return f"| rule | requirement | broken by |\n|---|---|---|\n{rows}\n"


def _example(example: Example) -> str:
    files = "with files that `shardway rules ID` shows" if example.files else ""
    return " ".join(filter(None, (f"`{example.overrides}`", example.describe_machine(), files)))


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
