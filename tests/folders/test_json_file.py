"""A JSON object is read; any other content gives an error message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.folders.json_file import (
    COUNT,
    FINITE,
    TEXT,
    DamagedFile,
    dump_like,
    or_null,
    read_fields,
    read_object,
    read_object_or_empty,
)


def test_an_object_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": {"ü": [1, null]}}', encoding="utf-8")
    assert read_object(file) == read_object_or_empty(file) == {"a": {"ü": [1, None]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "a list, expected an object"),
        (b"null", "a NoneType, expected an object"),
        (b'"{}"', "a str, expected an object"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff{}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_content_that_is_not_an_object_is_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json .*{said}"):
        read_object(file)
    assert read_object_or_empty(file) == {}


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_object(path)
        assert read_object_or_empty(path) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "a": 1e-05,\n  "b": [],\n  "c": {}\n}\n',
        '{\n    "a": "\\u00fc",\n    "n": [\n        1,\n        2\n    ]\n}',
        '{\n\t"a": "ü"\n}\n',
        '{"a":1,"b":[1,2]}',
        '{"a": 1, "b": [1, 2]}\n',
    ],
)
def test_a_changed_object_keeps_its_form(text: str) -> None:
    content = json.loads(text)
    assert dump_like(content, text) == text
    assert dump_like({**content, "z": 3}, text).count("\n") - text.count("\n") in (0, 1)


def test_a_new_file_is_indented_and_ends_in_a_newline() -> None:
    assert dump_like({"a": "ü"}, "") == '{\n  "a": "ü"\n}\n'


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"job": null}', '{"job": true}', '{"job": NaN}', "[" * 9999,
     '{"job": []}', "\0"],
)  # fmt: skip
def test_a_file_without_the_expected_fields_is_damaged_and_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "slurm.json"
    file.write_text(text)
    said = r"slurm\.json (is damaged|cannot be read|contains)"
    with pytest.raises(DamagedFile, match=said) as caught:
        read_fields(file, job=COUNT)
    assert caught.value.path == file


def test_fields_of_the_expected_types_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"job": "7", "end": null, "more": [1]}')
    found = read_fields(tmp_path / "a.json", job=TEXT, end=or_null(FINITE))
    assert found == {"job": "7", "end": None, "more": [1]}
