"""Every English text of the page has a Chinese translation."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import pytest

from launcher.folders import paths
from launcher.ui import override_syntax
from launcher.ui.form import FIELDS, GROUPS
from launcher.ui.i18n import ENGLISH, chinese

CODE = sorted(paths.bundled("ui").rglob("*.py"))


def asked(file: Path) -> set[str]:
    """The texts that a file of the page looks up."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    return {
        value.value
        for call in calls
        if isinstance(call.func, ast.Name | ast.Attribute)
        and (call.func.id if isinstance(call.func, ast.Name) else call.func.attr) == "translate"
        for argument in call.args
        if not isinstance(argument, ast.Subscript)
        for value in ast.walk(argument)
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


@pytest.mark.parametrize("file", CODE, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_text_in_the_code_is_translated(file: Path) -> None:
    assert asked(file) <= chinese().table.keys()


def test_texts_in_the_code_are_found() -> None:
    assert {"Start", "Export"} <= set().union(*map(asked, CODE))


def test_groups_and_the_help_of_settings_are_translated() -> None:
    help = {field.metadata["help"] for key in FIELDS if (field := override_syntax.field_of(key))}
    assert (help | GROUPS.keys()) <= chinese().table.keys()


def test_every_entry_is_used() -> None:
    """No entry is misspelled either: each one is a text in the code, the help of a setting, a
    state or a fact."""
    help = {field.metadata["help"] for key in FIELDS if (field := override_syntax.field_of(key))}
    known = set().union(*map(asked, CODE)) | help | GROUPS.keys()
    text = "\n".join(file.read_text() for file in [*CODE, *paths.bundled("chat").glob("*.py")])
    # Of launcher/run/status.py and Slurm.
    states = {"running", "pending", "finished", "stopped", "ended before it began", "damaged"}
    states |= {"writing", "reading back", "evaluating"}  # of launcher/export
    left = {e for e in chinese().table if e not in known and f'"{e}"' not in text} - states
    assert left == set()


def test_placeholders_are_the_same_in_both_languages() -> None:
    for english, other in chinese().table.items():
        assert placeholders(english) == placeholders(other)


def placeholders(text: str) -> list[str]:
    return sorted(name for _, name, *_ in string.Formatter().parse(text) if name)


def test_english_texts_are_unchanged() -> None:
    assert ENGLISH("Start") == "Start"
