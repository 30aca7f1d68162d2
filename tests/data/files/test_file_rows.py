"""What is read as rows: compressed and encoded text, other arrangements, nulls of Arrow."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.data import source
from launcher.data.files import file_rows

ROWS = [{"instruction": "é", "output": "a, b; c"}, {"instruction": "x", "output": "y"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
TEXTS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(ROWS),
    ".csv": 'instruction,output\né,"a, b; c"\nx,y\n',
    ".tsv": "instruction\toutput\né\ta, b; c\nx\ty\n",
}


def read(path: Path | str, **settings: Any) -> list[Any]:
    chosen = SourceConfig(path=str(path), **settings)
    return [row for _, row in source.iter_rows(chosen, by_line=False)]


def problems(path: Path | str, **settings: Any) -> list[str]:
    return source.find_problems(DataConfig(path=str(path), **settings))


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", TEXTS)
def test_compressed_text_is_read_directly(tmp_path: Path, suffix: str, compression: str) -> None:
    packed = PACK[compression](TEXTS[suffix].encode())
    path = write(tmp_path / f"rows{suffix}{compression.upper()}", packed)
    assert read(path) == read(tmp_path) == ROWS
    assert problems(path) == []
    assert "unpack it → data.streaming=false" in problems(path, streaming=True)[0]
    assert [*source.iter_content(SourceConfig(path=str(path)))][1] == packed
    path.write_bytes(packed[:-12])
    assert f"{path} " in problems(path)[0]
    path.write_bytes(b"no compressed data at all")
    assert f"{path} " in problems(path)[0]


def test_several_compressed_parts_in_one_file(tmp_path: Path) -> None:
    first, second = (json.dumps(row).encode() + b"\n" for row in ROWS)
    for suffix, pack in PACK.items():
        assert read(write(tmp_path / f"a.jsonl{suffix}", pack(first) + pack(second))) == ROWS


def test_compressed_raw_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress("one\ntwo\n".encode("utf-16")))
    (part,) = read(path, format="text", encoding="utf-16")
    assert part.text == "one\ntwo\n"


@pytest.mark.parametrize(
    "name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.gz", "a.parquet.gz", "a.jsonl.zip"]
)
def test_archives_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "rows.jsonl", LINES)
    path = write(tmp_path / name, b"x")
    (of_folder,) = problems(tmp_path)
    assert f"contains {path}, which cannot be read; unpack it" in of_folder
    (of_file,) = problems(path)
    assert of_file == f"data.path={path} cannot be read; unpack it"


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a;b\nq, r, s;t\n", ["a", "b"]),
        ("a\tb\nq; r, s\tt\n", ["a", "b"]),
        ("a,b\nq; r;\tt,s\n", ["a", "b"]),
        ("a,b;c\nq; r;\tt,s\n", ["a", "b;c"]),
        ("a;b, c\nq, r, s;t\nq;t\n", ["a", "b, c"]),
        ('"a";"b"\n"q, ""r""\ns";"t"\n', ["a", "b"]),
        ("a\nq\n", ["a"]),
    ],
)
def test_separators_of_csv(tmp_path: Path, text: str, columns: list[str]) -> None:
    rows = read(write(tmp_path / "rows.csv", text))
    assert [*rows[0]] == columns
    assert not any("," in value and ";" in value and "\t" in value for value in rows[0].values())


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "UTF-16LE", "gb18030"])
def test_encodings(
    tmp_path: Path, suffix: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"rows{suffix}", TEXTS[suffix].encode(encoding))
    assert read(path, encoding=encoding) == ROWS
    assert problems(path, encoding=encoding) == []
    monkeypatch.setattr(file_rows, "MAX_IN_MEMORY_BYTES", 1)
    assert read(path, encoding=encoding) == ROWS, "read row by row"
    if not (suffix == ".json" and "16" not in encoding):  # that is written in ASCII
        (found,) = problems(path)
        assert "is not UTF-8" in found
        assert "data.encoding=" in found


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, mark: bytes) -> None:
    codec = "utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"
    path = write(tmp_path / "a.csv", mark + TEXTS[".csv"].encode(codec))
    assert problems(path) == [f"data.path={path} is not UTF-8 but UTF-16 → data.encoding=utf-16"]
    assert read(path, encoding="utf-16") == read(path, encoding=codec) == ROWS


@pytest.mark.parametrize("encoding", ["no-such", "base64", "a\0b", ""])
def test_an_unknown_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (found,) = problems(write(tmp_path / "a.jsonl", LINES), encoding=encoding)
    assert found.startswith(f"data.encoding={encoding} is not an encoding that Python knows → ")


def test_the_encoding_is_part_of_the_content(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", LINES))
    utf_8 = [*source.iter_content(SourceConfig(path=path))]
    assert utf_8 == [f".jsonl {len(LINES.encode())}".encode(), LINES.encode()]
    assert [*source.iter_content(SourceConfig(path=path, encoding="UTF8"))] == utf_8
    latin = [*source.iter_content(SourceConfig(path=path, encoding="latin1"))]
    assert latin == [b"encoding iso8859-1", *utf_8]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("b.json", b"", "b.json is empty"),
        ("b.jsonl", b" \r\n\n", "b.jsonl is empty"),
        ("b.csv", b"\xef\xbb\xbf\n", "b.csv is empty"),
        ("b.parquet", b"", "b.parquet is empty"),
        ("b.arrow", b"", "b.arrow is empty"),
        ("b.jsonl.gz", gzip.compress(b"\n", mtime=0), "b.jsonl.gz is empty"),
        ("b.parquet", POINTER, "b.parquet is a Git LFS pointer, not the data → git lfs pull"),
        ("b.jsonl.gz", POINTER, "b.jsonl.gz is a Git LFS pointer, not the data → git lfs pull"),
    ],
)
def test_a_file_without_rows_is_named_before_launch(
    tmp_path: Path, name: str, content: bytes, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CHECKED_AT_SUBMIT_BYTES", 1)
    monkeypatch.setattr(source, "CHECKED_AT_SUBMIT_ROWS", 1)
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / name, content)
    (found,) = problems(tmp_path)
    assert sentence in found


@pytest.mark.parametrize(
    "name",
    ["cache-0a1b.arrow", "state.json", "dataset_infos.json", "metadata.json", "README.json",
     ".hidden.jsonl", ".ipynb_checkpoints/a.jsonl", "__pycache__/a.jsonl"],
)  # fmt: skip
def test_files_that_describe_others_are_no_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / "rows.jsonl", LINES)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, LINES.replace("x", "wrong"))
    assert read(tmp_path) == ROWS
    assert read(f"{tmp_path}/r*.j*") == ROWS
    if not name.startswith("cache-"):
        assert read(tmp_path / name)[1]["instruction"] == "wrong", "named explicitly"


def test_a_glob_leaves_out_what_is_no_data(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "state.json", "README.json"):
        write(tmp_path / name, LINES)
    assert read(f"{tmp_path}/*") == ROWS
    write(tmp_path / ".hidden.jsonl", LINES)
    assert read(f"{tmp_path}/.*.jsonl") == ROWS


@pytest.mark.parametrize("limit", [file_rows.MAX_IN_MEMORY_BYTES, 80])
@pytest.mark.parametrize("text", [LINES, "\n" + LINES.replace("\n", "\r\n"), "\ufeff" + LINES])
def test_json_lines_in_a_json_file(
    tmp_path: Path, text: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_rows, "MAX_IN_MEMORY_BYTES", limit)
    path = write(tmp_path / "a.json", text)
    assert read(path) == ROWS
    assert problems(path) == []
    write(path, text + '{"instruction": "q", "output": "a"},\n')
    (found,) = problems(path)
    assert "is not JSON: Extra data" in found


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"data": ROWS}, "has its rows under the key data"),
        ({"version": 1, "rows": ROWS}, "has its rows under the key rows"),
        ({"train": ROWS, "test": ROWS}, "has its rows under the key train, test"),
        ({"instruction": ["a", "b"], "output": ["c", "d"]}, "with the keys instruction, output"),
        ({"instruction": {"0": "a"}, "output": {"0": "b"}}, "with the keys instruction, output"),
        ({str(number): row for number, row in enumerate(ROWS * 9)}, "4, 5, 6, 7, …; write a list"),
        ({"messages": [[{"role": "user", "content": "q"}]]}, "with the keys messages"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_other_arrangements_of_json_are_named(
    tmp_path: Path, value: Any, sentence: str, indent: int | None
) -> None:
    path = write(tmp_path / "a.json", json.dumps(value, indent=indent))
    (found,) = problems(path)
    assert found.startswith(str(path))
    assert sentence in found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (json.dumps(ROWS[0], indent=1) * 2, "has several objects without a list around them"),
        (json.dumps(ROWS[0], indent=1), "must contain a list of rows, not one object"),
        ('{"a": 1},\n{"a": 2}', "has several objects without a list around them"),
        ('{"a": \n', "is not JSON"),
    ],
)
def test_objects_over_several_lines_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (found,) = problems(write(tmp_path / "a.json", text))
    assert sentence in found


def test_a_json_file_of_one_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for row in (ROWS[0], {"messages": messages}, {"messages": messages, "tools": tools}):
        path = write(tmp_path / "a.json", json.dumps(row))
        assert read(path) == [row]
        assert problems(path) == []


def calling(name: str, arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "q", "tool_calls": None}, turn]}


def arguments(rows: list[Any]) -> list[Any]:
    return [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]


CALLS = [calling("weather", {"city": "Oslo"}), calling("add", {"a": 1, "b": {"c": 2}})]


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = json.dumps(rows) if ".json" in path.suffixes else lines
    return write(path, gzip.compress(text.encode()) if path.suffix == ".gz" else text)


NAMES = ["a.json", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.gz"]


@pytest.mark.parametrize("name", NAMES)
def test_nulls_that_arrow_added_are_removed_from_json(tmp_path: Path, name: str) -> None:
    table = pa.Table.from_pylist(CALLS)
    Dataset(table).to_json(tmp_path / "of_datasets.jsonl")
    lines = (tmp_path / "of_datasets.jsonl").read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    assert arguments(stored)[0] == {"city": "Oslo", "a": None, "b": None}
    path = write_rows(tmp_path / name, stored)
    assert arguments(read(path)) == [{"city": "Oslo"}, {"a": 1, "b": {"c": 2}}]
    assert [*source.iter_content(SourceConfig(path=str(path)))][-1] == b"without nulls"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "rows",
    [
        [calling("search", {"from": "Oslo", "to": None}), calling("search", {"from": "Rome"})],
        [calling("search", {"limit": None}), *CALLS],
        [{**calling("search", {"limit": None}), "id": 1}, calling("search", {"limit": 3})],
        [calling("search", '{"limit": null}')] * 2,
        [{**calling("f", {}), "tools": [{"name": "f", "parameters": {"a": {"default": None}}},
                                        {"name": "g", "parameters": {}}]}],
    ],
)  # fmt: skip
def test_nulls_of_a_hand_written_file_stay(tmp_path: Path, name: str, rows: list[Any]) -> None:
    path = write_rows(tmp_path / name, rows)
    assert read(path) == rows
    assert b"without nulls" not in [*source.iter_content(SourceConfig(path=str(path)))]


def test_nulls_of_messages_cost_no_second_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [calling("f", {"a": 1})] * 2
    path = write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(file_rows, "_may_be_added", lambda *_: pytest.fail("read again"))
    assert read(path) == rows


def test_a_file_is_read_once_more_for_all_its_nulls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [calling("f", {"a": None, "b": 1})] * 50)
    readings = []
    may_be_added = file_rows.nulls.may_be_added

    def counted(rows: Iterable[Any]) -> bool:
        readings.append(1)
        return may_be_added(rows)

    monkeypatch.setattr(file_rows.nulls, "may_be_added", counted)
    assert arguments(read(path)) == [{"b": 1}] * 50
    assert read(path) == read(path)
    assert len(readings) == 1


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "instruction,instruction,output\na,b,c\n")
    assert problems(path) == [f"{path}:1 names the column instruction twice; rename one of them"]


def test_the_line_of_a_bad_quote_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,output\na,b\nc,"d"x\n')
    assert problems(path)[0].startswith(f"{path}:3 is not CSV")


def test_a_list_over_several_lines_is_no_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps([{"instruction": "q", "output": "a"}], indent=1))
    assert problems(path) == [
        f"{path} is a list over several lines, not one object per line; rename it to .json"
    ]


def test_a_value_that_is_nested_deeply_is_refused_if_it_matters(tmp_path: Path) -> None:
    deep: Any = {"city": None}
    for _ in range(900):
        deep = {"x": deep}
    row = {"instruction": "q", "output": "a", "meta": deep}
    assert problems(write(tmp_path / "a.jsonl", json.dumps(row) + "\n")) == []
