"""Raw text: what becomes a row, and that every token is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launcher.config.data import DataConfig
from launcher.data import source
from launcher.data.dataset import Rows, load_rows
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

LINES = ["first line\n", "\n", "a second one that is longer\n", "end"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(LINES))
    return path


def rows_of(path: Path, max_length: int, concatenate: bool) -> Rows:
    config = DataConfig(
        path=str(path), format="text", max_length=max_length, concatenate=concatenate
    )
    return load_rows(path, config, byte_tokenizer())


def texts(rows: Rows) -> list[str]:
    tokenizer = byte_tokenizer()
    return [str(tokenizer.decode(rows[number][0].tolist())) for number in range(len(rows))]


def test_a_file_is_cut_into_full_rows_and_nothing_is_lost(book: Path) -> None:
    rows = rows_of(book, 10, concatenate=True)
    assert [len(rows[number][0]) for number in range(len(rows))][:-1] == [10] * (len(rows) - 1)
    end = byte_tokenizer().eos_token
    assert "".join(texts(rows)) == "".join(LINES) + end
    assert rows.trained.all()
    assert (rows.truncated, rows.dropped) == (0, 0)


def test_each_line_is_a_row_and_what_is_longer_is_cut(book: Path) -> None:
    end = byte_tokenizer().eos_token
    rows = rows_of(book, 12, concatenate=False)
    assert texts(rows) == [f"first line{end}", "a second one", f"end{end}"]
    assert rows.truncated == 1
    assert rows.trained.all()


def test_rows_of_json_stand_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")))
    end = byte_tokenizer().eos_token
    assert texts(rows_of(path, 100, concatenate=True)) == [f"one{end}two{end}"]
    assert texts(rows_of(path, 100, concatenate=False)) == [f"one{end}", f"two{end}"]


def test_the_two_ways_are_kept_apart_in_the_cache(book: Path) -> None:
    joined, lines = (rows_of(book, 50, concatenate) for concatenate in (True, False))
    assert joined.fingerprint != lines.fingerprint
    assert not torch.equal(joined.starts, lines.starts)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"body": "x"}', "text is missing"),
        ("a.jsonl", b"[1]", "not an object with a field text"),
        ("a.csv", b"x", "ends in neither .json nor .jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_launch(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (found,) = source.problems(path, "text")
    assert sentence in found


def test_raw_text_without_its_format_says_which(tmp_path: Path, book: Path) -> None:
    (found,) = source.problems(book, "auto")
    assert "raw text is data=pretrain" in found
    with pytest.raises(UserError, match="raw text is data=pretrain"):
        source.to_messages("here", {"text": "x"}, "auto")
