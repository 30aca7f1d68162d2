"""Rows tokenized during training equal the rows that would have been stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.config.schema.training import TrainingConfig
from launcher.data.build import Loaders, build_loaders
from launcher.data.dataset import cache_key
from launcher.data.loader import Loader
from launcher.data.source import find_problems
from launcher.data.streaming import BLOCK_BYTES, open_files
from launcher.data.tokenize import RowTokenizer
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer


def loaders(
    config: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    global_batch_size: int = 4,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaders:
    training = TrainingConfig(micro_batch_size=2, global_batch_size=global_batch_size, seed=1)
    return build_loaders(
        config,
        training,
        tokenizer or byte_tokenizer(),
        rank,
        world_size,
        say=lambda line: None,
        check=lambda: None,
    )


def loader(config: DataConfig, rank: int = 0, world_size: int = 1) -> Loader:
    return loaders(config, rank, world_size).training


def input_ids(loader: Loader, steps: range) -> list[Any]:
    return [
        [batch.input_ids.tolist() for batch in loader.step_batch(step).micro_batches]
        for step in steps
    ]


def contents(loader: Loader) -> list[list[int]]:
    rows = loader.rows
    return [rows[row][0].tolist() for row in range(len(rows)) if rows.length(row)]


@pytest.fixture
def config(rows_file: Path, tmp_path: Path) -> DataConfig:
    """Thirteen rows, separated by empty lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + rows_file.read_text().replace("\n", "\n\n\r\n"))
    return DataConfig(path=str(path), max_length=64, pad_to_multiple_of=8, streaming=True)


def test_streamed_rows_equal_stored_rows(config: DataConfig) -> None:
    streamed, stored = loader(config), loader(replace(config, streaming=False))
    assert contents(streamed) == contents(stored)
    sequential = replace(config, shuffle=False)
    kept = loader(replace(sequential, streaming=False))
    steps = range(streamed.steps_per_epoch)
    assert input_ids(loader(sequential), steps) == input_ids(kept, steps)


def test_any_step_can_be_loaded_directly(config: DataConfig) -> None:
    """Resuming needs this: step 5 of a new process equals step 5 of the old one."""
    whole = input_ids(loader(config), range(8))
    assert input_ids(loader(config), range(5, 8)) == whole[5:]
    assert whole[:4] != whole[4:], "another order in the second epoch"


def test_ranks_split_the_rows_of_a_step(config: DataConfig) -> None:
    alone = loader(config)
    ranks = [loader(config, rank, 2) for rank in range(2)]
    for step in range(4):
        tokens = [int(each.step_batch(step).tokens) for each in ranks]
        assert sum(tokens) == int(alone.step_batch(step).tokens)


@pytest.mark.parametrize("packing", [False, True])
def test_raw_text_by_line(tmp_path: Path, packing: bool) -> None:
    path = tmp_path / "book.txt"
    path.write_text("first\n\n  \nx\nthird\x0cline\nend")
    config = DataConfig(
        path=str(path), format="text", concatenate=False, streaming=True, packing=packing,
        max_length=32,
    )  # fmt: skip
    found = [byte_tokenizer().decode(ids) for ids in contents(loader(config))]
    assert [text.partition("<")[0] for text in found] == ["first", "x", "third\x0cline", "end"]
    assert len(loader(config).step_batch(0).micro_batches) == (1 if packing else 2)


def test_an_arrow_file(config: DataConfig, tmp_path: Path) -> None:
    lines = Path(str(config.path)).read_text().splitlines()
    table = pa.Table.from_pylist([json.loads(line) for line in lines if line.strip()])
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=5)
    assert contents(loader(replace(config, path=str(path)))) == contents(loader(config))


def test_a_changed_file_is_detected(config: DataConfig) -> None:
    assert len(loader(config).rows) == 13
    path = Path(str(config.path))
    path.write_text(path.read_text() + path.read_text())
    assert len(loader(config).rows) == 26


def test_the_fingerprint_depends_on_the_content_of_the_file(config: DataConfig) -> None:
    path = Path(str(config.path))
    content = path.read_bytes()

    before = loaders(config).fingerprint
    path.write_bytes(content.replace(b"ask", b"ASK"))
    assert loaders(config).fingerprint != before, "as many rows of as many bytes"
    path.write_bytes(content)
    assert loaders(config).fingerprint == before


def write_arrow(path: Path, last: str) -> None:
    """A file that is larger than one block of reading, with `last` at its end."""
    table = pa.table({"instruction": ["x" * BLOCK_BYTES, last], "output": ["a", "a"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def test_the_fingerprint_covers_all_of_an_arrow_file(config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    found = []
    for last in ("one", "two", "one"):
        write_arrow(path, last)
        found.append(loaders(replace(config, path=str(path))).fingerprint)
    assert found[0] == found[2] != found[1]


def test_the_fingerprint_of_a_file_is_that_of_earlier_versions(config: DataConfig) -> None:
    """Their runs resume by it."""
    content = Path(str(config.path)).read_bytes()
    tokenizer = byte_tokenizer()
    key = cache_key(
        RowTokenizer(config, config, tokenizer), [xxhash.xxh3_128_hexdigest(content).encode()]
    )
    assert loaders(config, tokenizer=tokenizer).fingerprint == key


def test_the_key_of_a_source_depends_on_its_own_files(config: DataConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"instruction": "q", "output": "a"}\n')
    sources = {"a": SourceConfig(path=config.path), "b": SourceConfig(path=str(other))}
    both = replace(config, path=None, sources=sources)
    before = loaders(both).fingerprint.split()
    other.write_text('{"instruction": "q", "output": "b"}\n')
    after = loaders(both).fingerprint.split()
    assert before[0] == after[0] == loaders(config).fingerprint
    assert before[1] != after[1]


def test_max_rows_keeps_the_first_rows(config: DataConfig) -> None:
    first = replace(config, max_rows=5)
    assert contents(loader(first)) == contents(loader(config))[:5]


def test_a_conversation_of_several_rows_is_refused(config: DataConfig) -> None:
    """Rows are numbered before it is known that a conversation gives several."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{%- for m in messages %}{{ '[' + m.content }}{%- endfor %}"
    )
    built = loaders(config, global_batch_size=13, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"needs one row per conversation"):
        built.training.step_batch(0)


def test_a_bad_row_stops_the_run_at_its_step_or_is_skipped(config: DataConfig) -> None:
    path = Path(str(config.path))
    path.write_text(path.read_text() + '{"messages": []}\nbroken\n')
    failing = loader(replace(config, shuffle=False))
    failing.step_batch(2)
    with pytest.raises(UserError, match=r"rows\.jsonl \(byte \d+\): messages must be a list"):
        failing.step_batch(3)
    skipping = loader(replace(config, on_bad_row="skip"))
    total = sum(int(skipping.step_batch(step).tokens) for step in range(skipping.steps_per_epoch))
    assert total == sum(map(len, contents(loader(replace(config, on_bad_row="skip")))))
    assert len(skipping.rows) == 15
    assert skipping.rows.skipped == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a.json", "cannot be read by number; convert it to .jsonl or .arrow"),
        ("a.csv", "cannot be read by number; convert it to .jsonl or .arrow"),
        ("a.jsonl.gz", "cannot be read by number; unpack it"),
        ("hub:a/b", "is downloaded completely"),
    ],
)
def test_a_source_that_cannot_be_streamed_is_refused(
    tmp_path: Path, name: str, sentence: str
) -> None:
    if not name.startswith("hub:"):
        (tmp_path / name).write_text('[{"instruction": "q", "output": "a"}]')
        name = str(tmp_path / name)
    config = DataConfig(path=name, streaming=True)
    with pytest.raises(UserError, match=sentence):
        loader(config)
    (found,) = find_problems(config)
    assert sentence in found, "before the launch"


def test_newline_delimited_json_and_the_split_of_a_folder(
    config: DataConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.ndjson").write_bytes(Path(str(config.path)).read_bytes())
    (folder / "test.jsonl").write_text(Path(str(config.path)).read_text() * 2)
    (folder / ".hidden.jsonl").write_text("no JSON")
    assert contents(loader(replace(config, path=str(folder)))) == contents(loader(config))


def test_another_encoding(config: DataConfig, tmp_path: Path) -> None:
    text = '{"instruction": "\u4e2d\u6587 \u00e9", "output": "\u6587"}\n' * 3
    path = tmp_path / "gb.jsonl"
    path.write_bytes(text.encode("gb18030"))
    utf_8 = tmp_path / "utf_8.jsonl"
    utf_8.write_text(text)
    streamed = replace(config, path=str(path), encoding="GB18030")
    assert contents(loader(streamed)) == contents(loader(replace(config, path=str(utf_8))))
    assert (
        loaders(streamed).fingerprint == loaders(replace(streamed, encoding="gb18030")).fingerprint
    )
    other = replace(streamed, encoding="gbk")
    assert loaders(other).fingerprint != loaders(streamed).fingerprint
    with pytest.raises(UserError, match=r"is not JSON in UTF-8: .*data\.encoding=NAME"):
        loader(replace(config, path=str(path))).step_batch(0)
    with pytest.raises(UserError, match=r"finds no lines in data\.encoding=utf-16"):
        loader(replace(config, path=str(path), encoding="utf-16"))


def test_nulls_that_arrow_added_are_removed_at_any_row(config: DataConfig, tmp_path: Path) -> None:
    arguments = [{"a": 1, "b": None}, {"a": None, "b": 2}, {"a": 3, "b": None}]
    calls = [[{"function": {"name": "f", "arguments": each}}] for each in arguments]
    rows = [{"messages": [{"role": "assistant", "tool_calls": each}]} for each in calls]
    path = tmp_path / "calls.jsonl"
    added = SourceConfig(path=str(path))

    def streamed_calls() -> list[Any]:
        (file,) = open_files(added)
        found: list[Any] = [file[number][1] for number in reversed(range(3))]
        return [row["messages"][0]["tool_calls"][0]["function"]["arguments"] for row in found]

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert streamed_calls() == [{"a": 3}, {"b": 2}, {"a": 1}]
    del arguments[2]["b"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert streamed_calls() == [{"a": 3}, {"a": None, "b": 2}, {"a": 1, "b": None}], "hand-written"


@pytest.mark.parametrize("name", ["empty.jsonl", "pointer.arrow"])
def test_a_file_without_data_is_refused(config: DataConfig, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n" if name == "empty.jsonl" else "version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"is empty|is a Git LFS pointer"):
        loader(replace(config, path=str(path)))


def test_no_tensor_is_as_long_as_the_data(config: DataConfig) -> None:
    """The order of an epoch and the sequences are ranges and blocks, not lists."""
    made = loader(config)
    assert isinstance(made.sequences.rows, range)
    assert isinstance(made.sequences.starts, range)
    assert not any(isinstance(value, torch.Tensor) for value in vars(made.sampler).values())
