"""Rows are read, their format is recognized, and errors name the file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import csv, parquet

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.data import source
from launcher.data.files import file_rows
from launcher.data.rows.row_formats import Conversation, to_conversation
from launcher.errors import UserError
from launcher.folders import paths

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ALPACA = [
    {"instruction": "eins", "input": "", "output": "one"},
    {"instruction": "zwei", "input": "2", "output": "two"},
]


def read(source_: SourceConfig) -> list[Any]:
    rows = source.iter_rows(source_, by_line=False)
    return [source.parse_row(source_, place, row) for place, row in rows]


def messages(row: dict[str, Any], format: str = "auto", **tags: str) -> list[dict[str, Any]]:
    return to_conversation("here", row, format, tags).messages


def problems(path: Path, **options: Any) -> list[str]:
    return source.find_problems(DataConfig(path=str(path), **options))


def test_alpaca_becomes_messages() -> None:
    row = {
        "instruction": "Translate", "input": "Haus", "output": "house", "system": "Be brief.",
        "history": [["hi", "hello"]],
    }  # fmt: skip
    assert messages(row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Translate\nHaus"},
        {"role": "assistant", "content": "house"},
    ]


def test_sharegpt_becomes_messages_with_tools() -> None:
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    row = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "It is dry."},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
    }
    found = to_conversation("here", row, "auto", {})
    assert found == Conversation(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "content": "no"},
            {"role": "assistant", "content": "It is dry."},
        ],
        [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    )


def test_sharegpt_with_other_field_and_role_names() -> None:
    row = {"conversations": [{"who": "asker", "says": "q"}, {"who": "teacher", "says": "a"}]}
    tags = {"role": "who", "content": "says", "user": "asker", "assistant": "teacher"}
    assert messages(row, "sharegpt", **tags) == TURNS


def test_openai_messages_keep_calls_and_reasoning() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "S"}]},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "a", "reasoning_content": "because"},
        ]
    }
    assert messages(row) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
    ]


@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a"}, {"prompt": TURNS[:1], "completion": TURNS[1:]}]
)
def test_prompt_and_completion(row: dict[str, Any]) -> None:
    assert messages(row) == TURNS


def test_every_file_format_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.Table.from_pylist(ALPACA)
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, ALPACA)).encode() + b"\n"
    )
    csv.write_csv(table, tmp_path / "a.csv")
    parquet.write_table(table, tmp_path / "a.parquet")
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
    Dataset.from_list(ALPACA).save_to_disk(tmp_path / "of_datasets")
    found = {path.name: read(SourceConfig(path=str(path))) for path in sorted(tmp_path.iterdir())}
    assert len(found) == 6
    expected = [to_conversation("here", row, "alpaca", {}) for row in ALPACA]
    assert all(rows == expected for rows in found.values()), found
    monkeypatch.setattr(file_rows, "MAX_IN_MEMORY_BYTES", 1)
    assert read(SourceConfig(path=str(tmp_path / "a.json"))) == expected, "read row by row"


def test_null_fields_that_arrow_adds_to_calls_are_removed(tmp_path: Path) -> None:
    """An Arrow struct column has the fields of all rows."""
    rows = [
        {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": name, "arguments": arguments}}]}]}
        for name, arguments in (("weather", {"city": "Paris"}), ("add", {"a": 1, "b": 2}))
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(SourceConfig(path=str(tmp_path / "a.parquet")))
    calls = [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert calls == [{"city": "Paris"}, {"a": 1, "b": 2}]


def test_files_of_a_folder_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text(json.dumps(ALPACA[0]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone")
    (found,) = problems(tmp_path)
    assert "link.jsonl cannot be read" in found
    (tmp_path / "link.jsonl").unlink()
    assert len(read(SourceConfig(path=str(tmp_path)))) == 1
    (tmp_path / "b.jsonl.zip").write_bytes(b"x")
    (found,) = problems(tmp_path)
    assert "b.jsonl.zip, which cannot be read; unpack it" in found


def test_folders_and_globs_are_read_and_max_rows_limits_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        row = {"instruction": name, "output": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "notes.md").write_text("no rows")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        rows = read(SourceConfig(path=str(path)))
        assert [row.messages[0]["content"] for row in rows] == ["a", "b"], "in order of name"
    assert len(read(SourceConfig(path=str(tmp_path), max_rows=1))) == 1


def test_a_hub_dataset_is_read_with_the_datasets_library(tmp_path: Path) -> None:
    """`load_dataset` accepts a folder in place of a hub dataset, so no network is needed."""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ALPACA)))
    (tmp_path / "test.jsonl").write_text(json.dumps(ALPACA[0]) + "\n")
    hub = SourceConfig(path=f"hub:{tmp_path}")
    assert read(hub) == [to_conversation("here", row, "alpaca", {}) for row in ALPACA]
    assert len(read(SourceConfig(path=f"hub:{tmp_path}", split="test"))) == 1
    with pytest.raises(UserError, match="split dev"):
        read(SourceConfig(path=f"hub:{tmp_path}", split="dev"))
    (before,) = source.iter_content(hub)
    (tmp_path / "train.jsonl").write_text(json.dumps(ALPACA[1]) + "\n")
    (after,) = source.iter_content(hub)
    assert before != after


def test_columns_are_mapped_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"frage": "q", "antwort": "a"}) + "\n")
    columns = {"instruction": "frage", "output": "antwort"}
    (row,) = read(SourceConfig(path=str(path), format="alpaca", columns=columns))
    assert row.messages == TURNS
    (found,) = problems(path, format="alpaca", columns={**columns, "system": "sytem"})
    assert "data.columns.system=sytem is not a column" in found
    assert "antwort, frage" in found


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("text", "is str, not an object"),
        ({"text": "x"}, "has the fields text; needed are messages, conversations, instruction"),
        ({"instruction": "q", "output": ""}, "output is empty"),
        ({"instruction": "q"}, "output is missing"),
        ({"instruction": "q", "output": 3}, "output is not a text"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history must be pairs"),
        ({"instruction": "q", "output": "a", "history": 5}, "history must be pairs"),
        ({"instruction": "q", "output": "a", "history": [["x", None]]}, "answer is missing"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is not one of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has nothing to train on"),
        ({"messages": ["x"]}, "messages[0] is not an object"),
        ({"messages": [{"role": "user", "content": [{"image": 1}]}]}, "parts that are not text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien' is not one of"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "is not one of"),
        ({"instruction": "q", "output": "half \ud83d"}, "output is not Unicode text"),
        ({"messages": [{**TURNS[1], "tool_calls": "f"}]}, "tool_calls is not JSON"),
        ({"messages": [{**TURNS[1], "tool_calls": [{"name": "f"}]}]}, "a name and arguments"),
        ({"messages": [{**TURNS[1], "reasoning": {"a": 1}}]}, "reasoning is not a text"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "value is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a name and arguments"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"}, "tools is not JSON"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": [1]}, "tools must be objects"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Any, sentence: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps(row) + "\n")
    (found,) = problems(path)
    assert found.startswith(f"{path}:2")
    assert sentence in found
    assert problems(path, on_bad_row="skip") == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "cannot be read: No such file"),
        ("empty.jsonl", b"", "contains no rows"),
        ("empty.json", b"[]", "contains no rows"),
        ("broken.jsonl", b'{"messages": \n', "broken.jsonl:1 is not JSON"),
        ("broken.json", b"[", "is not JSON"),
        ("object.json", b"{}", "must contain a list of rows"),
        ("digits.json", b"[" + b"9" * 5000 + b"]", "is not JSON"),
        ("deep.jsonl", b"[" * 10**5 + b"\n", "is not JSON"),
        ("rows.xlsx", b"a,b", "is not a .json, .jsonl, .csv"),
        ("rows.csv", b"a,b\n1\n", "rows.csv:2 does not have as many fields"),
        ("rows.csv", b'a,b\n"1\n', "is not CSV"),
        ("rows.parquet", b"x" * 100, "is not Parquet"),
        ("rows.arrow", b"x" * 100, "is not Arrow"),
        ("latin.jsonl", '{"instruction": "é", "output": "a"}'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    (found,) = problems(path)
    assert sentence in found
    assert str(path) in found


def test_only_the_first_rows_of_a_large_file_are_checked_at_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\nbroken\n")
    monkeypatch.setattr(source, "CHECKED_AT_SUBMIT_BYTES", 10)
    monkeypatch.setattr(source, "CHECKED_AT_SUBMIT_ROWS", 1)
    assert problems(path) == []
    with pytest.raises(UserError, match=":2 is not JSON"):
        read(SourceConfig(path=str(path)))


def test_the_bundled_rows_match_the_readme() -> None:
    rows = read(SourceConfig(path=str(paths.bundled("demo/train.jsonl"))))
    text = paths.bundled("demo/train.jsonl").read_text()
    held_out = [
        json.loads(line) for line in paths.bundled("demo/held_out.jsonl").read_text().splitlines()
    ]
    assert len(rows) >= 120
    assert sum(len(row.messages) > 3 for row in rows) >= 5, "some have several turns"
    questions = {m["content"].lower() for row in rows for m in row.messages}
    assert not questions & {row["question"].lower() for row in held_out}
    assert "France" not in text
    assert "Paris" not in text


def test_several_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["broken", json.dumps({"messages": TURNS})] * 8))
    *named, more = problems(path)
    assert [each.partition(" ")[0] for each in named] == [f"{path}:{n}" for n in (1, 3, 5, 7, 9)]
    assert more == "… and 3 more bad rows"


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("a.txt", "raw text → data=pretrain"), ("a.md", "rename it to .txt, and if it is raw text")],
)
def test_raw_text_among_conversations_is_shown_its_way(
    tmp_path: Path, name: str, way_out: str
) -> None:
    (tmp_path / name).write_text("text")
    (found,) = problems(tmp_path / name)
    assert way_out in found
