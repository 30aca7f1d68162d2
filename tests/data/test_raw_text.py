"""Raw text: how it is divided into rows, and that every token is in the loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launcher.config.schema.data import DataConfig
from launcher.data import raw_text, source
from launcher.data.dataset import TokenizedDataset, load_data, load_evaluation
from launcher.data.rows.row_formats import to_conversation
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

LINES = ["first line\n", "\n", "a second one that is longer\n", "end"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(LINES))
    return path


def data_of(path: Path, max_length: int, concatenate: bool) -> TokenizedDataset:
    config = DataConfig(
        path=str(path), format="text", max_length=max_length, concatenate=concatenate
    )
    return load_data(config, byte_tokenizer())


def texts(data: TokenizedDataset) -> list[str]:
    tokenizer = byte_tokenizer()
    return [str(tokenizer.decode(data.rows[row][0].tolist())) for row in range(len(data.rows))]


def all_learned(data: TokenizedDataset) -> bool:
    return all(data.rows[row][1].all() for row in range(len(data.rows)))


def test_a_file_is_cut_into_full_rows_and_nothing_is_lost(book: Path) -> None:
    data = data_of(book, 10, concatenate=True)
    assert set(data.rows.lengths[:-1]) == {10}
    end = byte_tokenizer().eos_token
    assert "".join(texts(data)) == "".join(LINES) + end
    assert all_learned(data)
    (summary,) = data.summaries.values()
    assert (summary.truncated, summary.dropped) == (0, 0)


def test_each_line_is_a_row_and_long_lines_are_truncated(book: Path) -> None:
    end = byte_tokenizer().eos_token
    data = data_of(book, 12, concatenate=False)
    assert texts(data) == [f"first line{end}", "a second one", f"end{end}"]
    assert data.summaries["data"].truncated == 1
    assert all_learned(data)
    exact = data_of(book, len(LINES[2]), concatenate=False)
    assert texts(exact)[1] == LINES[2].rstrip() + end
    assert exact.summaries["data"].truncated == 0


def test_a_file_is_read_in_parts_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number}\n" for number in range(300)) + "x" * 900)
    whole = texts(data_of(path, 50, concatenate=True))
    monkeypatch.setattr(source, "PART_CHARACTERS", 100)
    monkeypatch.setattr(raw_text, "PART_CHARACTERS", 100)
    parts = list(source.iter_rows(DataConfig(path=str(path), format="text"), by_line=False))
    assert len(parts) > 20
    assert "".join(part.text for _, part in parts) == path.read_text()
    assert [part.is_first for _, part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.is_last for _, part in parts] == [False] * (len(parts) - 1) + [True]
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path))
    assert texts(data_of(path, 50, concatenate=True)) == whole
    end = byte_tokenizer().eos_token
    assert "".join(whole) == path.read_text() + end, "one end, at the end"


def test_evaluation_rows_are_read_in_the_same_way_as_the_sources(book: Path) -> None:
    config = DataConfig(
        sources={"a": {"path": str(book), "format": "text"}}, eval_path=str(book), max_length=10
    )
    assert source.find_problems(config) == []
    assert texts(load_evaluation(config, byte_tokenizer())) == texts(data_of(book, 10, True))


def test_a_text_may_have_a_class_and_no_image(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good", "label": 1, "weight": 0.5}\n')
    config = DataConfig(path=str(path), format="text")
    assert source.find_problems(config) == []
    path.write_text('{"text": "<image> good", "images": ["x.png"]}\n')
    assert "has images, and only text" in source.find_problems(config)[0]


def test_json_rows_are_concatenated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")))
    end = byte_tokenizer().eos_token
    assert texts(data_of(path, 100, concatenate=True)) == [f"one{end}two{end}"]
    assert texts(data_of(path, 100, concatenate=False)) == [f"one{end}", f"two{end}"]


def test_concatenated_and_separate_rows_have_different_cache_entries(book: Path) -> None:
    joined, lines = (data_of(book, 50, concatenate) for concatenate in (True, False))
    assert joined.fingerprint != lines.fingerprint
    assert not np.array_equal(joined.rows.lengths, lines.rows.lengths)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b" \n", "contains no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"body": "x"}', "text is missing"),
        ("a.jsonl", b"[1]", "not an object with named fields"),
        ("a.xml", b"x", "is not a .json, .jsonl, .csv, .parquet, .arrow, .txt file"),
    ],
)
def test_a_bad_file_is_reported_before_launch(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (found,) = source.find_problems(DataConfig(path=str(path), format="text"))
    assert sentence in found


def test_raw_text_without_its_format_names_the_format(book: Path) -> None:
    (found,) = source.find_problems(DataConfig(path=str(book)))
    assert "if it is raw text → data=pretrain" in found
    with pytest.raises(UserError, match="raw text is data=pretrain"):
        to_conversation("here", {"text": "x"}, "auto", {})
