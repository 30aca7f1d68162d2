"""Command-line arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.commands.arguments import parse_size, picture_path
from launcher.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("100MB", 10**8), ("1.5 kb", 1500), ("2GiB", 2 * 2**30), ("77", 77)],
)
def test_sizes_are_decimal_unless_written_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5XB", "5 G B"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_a_picture_without_a_name_gets_the_next_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a-2.png", "a-3.png"):
        assert picture_path(None, "a.png", overwrite=False) == Path(name)
        Path(name).touch()
