"""Rows are read, recognised, and refused with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import paths
from launcher.data import source
from launcher.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_alpaca_becomes_messages() -> None:
    row = {
        "instruction": "Translate", "input": "Haus", "output": "house", "system": "Be brief.",
        "history": [["hi", "hello"]],
    }  # fmt: skip
    assert source.to_messages("here", row, "auto") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Translate\nHaus"},
        {"role": "assistant", "content": "house"},
    ]


def test_an_array_and_lines_read_alike(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"instruction": "q", "output": "a"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    arrays = [messages for _, messages in source.read_messages(tmp_path / "a.json", "auto")]
    lines = [messages for _, messages in source.read_messages(tmp_path / "a.jsonl", "auto")]
    assert arrays == lines == [TURNS, TURNS]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("text", "is str, not an object"),
        ({"text": "x"}, "has the fields text; needed are messages, or instruction and output"),
        ({"instruction": "q", "output": ""}, "output is empty"),
        ({"instruction": "q"}, "output is missing"),
        ({"instruction": "q", "output": 3}, "output is no text"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history must be pairs"),
        ({"instruction": "q", "output": "a", "history": 5}, "history must be pairs"),
        ({"instruction": "q", "output": "a", "history": [["x", None]]}, "answer is missing"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is none of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no answer to learn"),
        ({"messages": ["x"]}, "messages[0] is not an object"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Any, sentence: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps(row) + "\n")
    (found,) = source.problems(path, "auto")
    assert found.startswith(f"{path}:2")
    assert sentence in found


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "cannot be read: No such file"),
        ("empty.jsonl", "", "holds no rows"),
        ("empty.json", "[]", "holds no rows"),
        ("broken.jsonl", '{"messages": \n', "broken.jsonl:1 is not JSON"),
        ("broken.json", "[", "is not JSON"),
        ("object.json", "{}", "must hold a list of rows"),
        ("rows.csv", "a,b", "ends in neither .json nor .jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    (found,) = source.problems(path, "auto")
    assert sentence in found
    assert str(path) in found


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"instruction": "é", "output": "a"}'.encode("latin-1"))
    (found,) = source.problems(path, "auto")
    assert "is not UTF-8" in found


def test_a_large_file_is_only_opened_at_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\nbroken\n")
    monkeypatch.setattr(source, "CHECKED_AT_SUBMIT_BYTES", 10)
    assert source.problems(path, "auto") == []
    with pytest.raises(UserError, match=":2 is not JSON"):
        list(source.read_messages(path, "auto"))


def test_the_bundled_rows_are_what_the_readme_says() -> None:
    rows = list(source.read_messages(paths.bundled("demo/train.jsonl"), "messages"))
    text = paths.bundled("demo/train.jsonl").read_text()
    held_out = [
        json.loads(line) for line in paths.bundled("demo/held_out.jsonl").read_text().splitlines()
    ]
    assert len(rows) >= 120
    assert sum(len(messages) > 3 for _, messages in rows) >= 5, "some have several turns"
    questions = {m["content"].lower() for _, messages in rows for m in messages}
    assert not questions & {row["question"].lower() for row in held_out}
    assert "France" not in text
    assert "Paris" not in text
