"""LLaMA-Factory's dataset_info.json is read without changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema.data import DataConfig
from launcher.data import source
from launcher.data.rows.row_formats import Conversation
from launcher.data.source import TextPart

# The forms of entries in LLaMA-Factory's data/README.md.
INFO: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "mapped": {
        "file_name": "mapped.json",
        "columns": {"prompt": "q", "query": "more", "response": "a", "history": "before"},
        "num_samples": 1,
    },
    "tools": {
        "file_name": "tools.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "openai": {
        "file_name": "openai.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "c4": {"file_name": "c4.jsonl", "columns": {"prompt": "body"}},
    "online": {
        "hf_hub_url": "owner/name",
        "ms_hub_url": "other/name",
        "subset": "en",
        "split": "test",
    },
    "openai2": {"file_name": "openai.json", "formatting": "openai"},
    "few": {"file_name": "x.json", "num_samples": "5"},
    "part": {"hf_hub_url": "owner/name", "folder": "python"},
    "dpo": {"file_name": "dpo.json", "ranking": True},
    "seen": {"file_name": "seen.json", "columns": {"images": "images"}},
    "other": {"file_name": "x.json", "formatting": "xml"},
    "nowhere": {},
}
SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    rows = {
        "identity.json": [{"instruction": "q", "input": "", "output": "a"}],
        "mapped.json": [{"q": "q", "a": "a"}, {"q": "2", "more": "x", "a": "b"}],
        "tools.json": [{"conversations": SAID}],
        "openai.json": [{"messages": PAIR}],
        "c4.jsonl": [{"body": "a text"}],
    }
    for name, each in rows.items():
        text = json.dumps(each) if name.endswith(".json") else "\n".join(map(json.dumps, each))
        (tmp_path / name).write_text(text)
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(INFO))
    return path


def test_datasets_are_read_by_name(info: Path) -> None:
    config = DataConfig(dataset_info=str(info), name="identity, mapped,tools,openai,openai2")
    sources = source.resolve_sources(config)
    assert list(sources) == ["identity", "mapped", "tools", "openai", "openai2"]
    assert source.find_problems(config) == []
    for each in sources.values():
        rows = [source.parse_row(each, place, row) for place, row in source.iter_rows(each, False)]
        assert [row.messages for row in rows] == [PAIR], "num_samples is one"


def test_entries_with_raw_text_and_hub_datasets_are_read(info: Path) -> None:
    config = DataConfig(dataset_info=str(info), name="c4", format="text")
    (each,) = source.resolve_sources(config).values()
    assert [source.parse_row(each, p, r) for p, r in source.iter_rows(each, False)] == [
        TextPart("a text")
    ]
    (online,) = source.resolve_sources(DataConfig(dataset_info=str(info), name="online")).values()
    assert (online.path, online.subset, online.split) == ("hub:owner/name", "en", "test")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("identty", "data.name=identty is not in"),
        ("", "data.name names no data set"),
        ("dpo", "dpo has ranking, which is not supported"),
        ("seen", "seen has images"),
        ("other", "formatting xml is not one of"),
        ("few", "num_samples '5' is not a number"),
        ("part", "part has folder, which is not supported"),
        ("nowhere", "has neither file_name nor hf_hub_url"),
    ],
)
def test_an_entry_that_cannot_be_read_is_refused_with_the_reason(
    info: Path, name: str, sentence: str
) -> None:
    (found,) = source.find_problems(DataConfig(dataset_info=str(info), name=name))
    assert sentence in found
    assert str(info) in found


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_bad_file_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "dataset_info.json"
    if content is not None:
        path.write_text(content)
    (found,) = source.find_problems(DataConfig(dataset_info=str(path), name="a"))
    assert f"data.dataset_info={path}" in found


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt", "openai"])
def test_columns_for_tools_and_system_are_read(tmp_path: Path, formatting: str) -> None:
    columns = {"tools": "my_tools", "system": "my_system"}
    row: dict[str, Any] = {"my_tools": json.dumps([{"name": "f"}]), "my_system": "S"}
    if formatting == "alpaca":
        row |= {"instruction": "q", "output": "a"}
    elif formatting == "openai":
        columns["messages"] = "talk"
        row["talk"] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    else:
        row["conversations"] = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    entry = {"file_name": "rows.json", "formatting": formatting, "columns": columns}
    (tmp_path / "info.json").write_text(json.dumps({"mine": entry}))
    config = DataConfig(dataset_info=str(tmp_path / "info.json"), name="mine")
    (found,) = source.resolve_sources(config).values()
    ((location, raw),) = source.iter_rows(found, by_line=False)
    talk = source.parse_row(found, location, raw)
    assert isinstance(talk, Conversation)
    assert talk.messages[0] == {"role": "system", "content": "S"}
    assert talk.tools == [{"type": "function", "function": {"name": "f"}}]
    assert talk.notes == ()


def test_columns_and_keys_that_do_not_exist_are_named(info: Path) -> None:
    entries = {
        "misspelt": {**INFO["mapped"], "columns": {"prompt": "qeustion", "response": "a"}},
        "key": {**INFO["mapped"], "column": {"prompt": "q"}},
        "column": {**INFO["mapped"], "columns": {"promt": "q"}},
        "tag": {**INFO["openai"], "tags": {"rol_tag": "role"}},
    }
    info.write_text(json.dumps(entries))
    sentences = {
        "misspelt": "instruction=qeustion is not a column of",
        "key": "has column, which is not a key of an entry",
        "column": "has promt in columns; known are prompt, query",
        "tag": "has rol_tag in tags; known are role_tag",
    }
    for name, sentence in sentences.items():
        config = DataConfig(dataset_info=str(info), name=name)
        assert any(sentence in problem for problem in source.find_problems(config)), name


def test_the_folder_of_a_list_names_the_list(info: Path) -> None:
    assert [*source.resolve_sources(DataConfig(dataset_info=str(info.parent), name="identity"))]
