"""A JSON object is read; any other content gives an error message."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.folders.json_file import read_object, read_object_or_empty


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
