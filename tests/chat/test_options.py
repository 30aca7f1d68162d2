"""Options and conversations are validated, and typed text is parsed."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.chat.line_reader import Entry, read_entry
from launcher.chat.options import Options, check_conversation, options_from_json
from launcher.errors import UserError
from tests.helpers.chat import typed


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": 2.0},
        {"temperature": -1},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
        {"top_k": 4},
        {"max_new_tokens": None},
        [],
        None,
    ],
)
def test_options_out_of_range_are_refused_by_name(given: Any) -> None:
    with pytest.raises(UserError, match="|".join(given or ["options"])):
        options_from_json(given)


def test_options_are_parsed_from_typed_text() -> None:
    options = Options().with_text("temperature", "0.7").with_text("seed", "3")
    assert options == Options(temperature=0.7, seed=3)
    assert options.with_text("seed", "none").seed is None
    for name, text in (("seed", "x"), ("temperature", "hot"), ("top_k", "4"), ("seed", "")):
        with pytest.raises(UserError, match=name):
            options.with_text(name, text)


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        {},
        None,
        ["hi"],
        [{"role": "user"}],
        [{"role": "robot", "content": "hi"}],
        [{"role": ["user"], "content": "hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_an_invalid_conversation_is_refused(conversation: Any) -> None:
    with pytest.raises(UserError):
        check_conversation(conversation)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["hi "], "hi"),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (["a\\"], "a"),
        (['"""', "a", "", ' b"""'], "a\n\n b"),
        (['"""one"""'], "one"),
        (['"""a', "/exit", '"""'], "a\n/exit"),
        ([" /etc/passwd?"], "/etc/passwd?"),
    ],
)
def test_lines_and_blocks_are_read_as_one_entry(lines: list[str], text: str) -> None:
    assert read_entry(typed(*lines)) == Entry(text)


def test_commands_are_one_line_and_an_open_block_is_reported() -> None:
    assert read_entry(typed("/set seed 3 ")) == Entry("/set seed 3", command=True)
    with pytest.raises(EOFError):
        read_entry(typed())
    with pytest.raises(UserError, match="inside a block"):
        read_entry(typed('"""a', "b"))
