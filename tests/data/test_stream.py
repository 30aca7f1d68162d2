"""Rows that are tokenised while training are those that would have been stored."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from launcher.config.data import DataConfig
from launcher.data.build import build_loaders
from launcher.data.loader import Loader
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer


def loader(config: DataConfig, rank: int = 0, world_size: int = 1) -> Loader:
    deal = partial(
        Loader, rank=rank, world_size=world_size, micro_batch_size=2, global_batch_size=4
    )
    said: list[str] = []
    built = build_loaders(config, byte_tokenizer(), 1, deal, said.append, lambda: None)
    return built.training


def windows(loader: Loader, steps: range) -> list[Any]:
    return [
        [batch.input_ids.tolist() for batch in loader.window(step).micro_batches] for step in steps
    ]


def contents(loader: Loader) -> list[list[int]]:
    rows = loader.rows
    return [rows[row][0].tolist() for row in range(len(rows)) if rows.length(row)]


@pytest.fixture
def config(rows_file: Path, tmp_path: Path) -> DataConfig:
    """Thirteen rows, between empty lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + rows_file.read_text().replace("\n", "\n\n\r\n"))
    return DataConfig(path=str(path), max_length=64, pad_to_multiple_of=8, streaming=True)


def test_the_rows_are_those_of_a_stored_run(config: DataConfig) -> None:
    streamed, stored = loader(config), loader(replace(config, streaming=False))
    assert contents(streamed) == contents(stored)
    in_order = replace(config, shuffle=False)
    kept = loader(replace(in_order, streaming=False))
    steps = range(streamed.steps_per_epoch)
    assert windows(loader(in_order), steps) == windows(kept, steps)


def test_any_step_is_found_again_at_once(config: DataConfig) -> None:
    """What resuming needs: step 5 of a new process is step 5 of the old one."""
    whole = windows(loader(config), range(8))
    assert windows(loader(config), range(5, 8)) == whole[5:]
    assert whole[:4] != whole[4:], "another order in the second epoch"


def test_ranks_share_a_step(config: DataConfig) -> None:
    alone = loader(config)
    ranks = [loader(config, rank, 2) for rank in range(2)]
    for step in range(4):
        tokens = [int(each.window(step).tokens) for each in ranks]
        assert sum(tokens) == int(alone.window(step).tokens)


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
    assert len(loader(config).window(0).micro_batches) == (1 if packing else 2)


def test_an_arrow_file(config: DataConfig, tmp_path: Path) -> None:
    lines = Path(str(config.path)).read_text().splitlines()
    table = pa.Table.from_pylist([json.loads(line) for line in lines if line.strip()])
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=5)
    assert contents(loader(replace(config, path=str(path)))) == contents(loader(config))


def test_a_changed_file_is_noticed(config: DataConfig) -> None:
    assert len(loader(config).rows) == 13
    path = Path(str(config.path))
    path.write_text(path.read_text() + path.read_text())
    assert len(loader(config).rows) == 26


def test_other_data_under_the_same_name_are_other_data(config: DataConfig) -> None:
    path = Path(str(config.path))
    content = path.read_bytes()

    def fingerprint() -> str:
        said: list[str] = []
        deal = partial(Loader, rank=0, world_size=1, micro_batch_size=2, global_batch_size=4)
        built = build_loaders(config, byte_tokenizer(), 1, deal, said.append, lambda: None)
        return built.fingerprint

    before = fingerprint()
    path.write_bytes(content.replace(b"ask", b"ASK"))
    assert fingerprint() != before, "as many rows of as many bytes"
    path.write_bytes(content)
    assert fingerprint() == before


def test_the_first_rows_alone(config: DataConfig) -> None:
    first = replace(config, max_rows=5)
    assert contents(loader(first)) == contents(loader(config))[:5]


def test_a_conversation_of_several_rows_is_refused(config: DataConfig) -> None:
    """They are numbered before it is known that there are several."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{%- for m in messages %}{{ '[' + m.content }}{%- endfor %}"
    )
    deal = partial(Loader, rank=0, world_size=1, micro_batch_size=2, global_batch_size=13)
    built = build_loaders(config, tokenizer, 1, deal, print, lambda: None)
    with pytest.raises(UserError, match=r"takes a conversation for one row"):
        built.training.window(0)


def test_a_bad_row_ends_the_run_when_it_comes_or_is_empty(config: DataConfig) -> None:
    path = Path(str(config.path))
    path.write_text(path.read_text() + '{"messages": []}\nbroken\n')
    failing = loader(replace(config, shuffle=False))
    failing.window(2)
    with pytest.raises(UserError, match=r"rows\.jsonl \(byte \d+\): messages must be a list"):
        failing.window(3)
    skipping = loader(replace(config, on_bad_row="skip"))
    total = sum(int(skipping.window(step).tokens) for step in range(skipping.steps_per_epoch))
    assert total == sum(map(len, contents(loader(replace(config, on_bad_row="skip")))))
    assert len(skipping.rows) == 15
    assert skipping.rows.skipped == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("a.json", "cannot be found by number"), ("hub:a/b", "is downloaded whole")],
)
def test_what_cannot_be_streamed_is_said(tmp_path: Path, name: str, sentence: str) -> None:
    if name == "a.json":
        (tmp_path / name).write_text('[{"instruction": "q", "output": "a"}]')
        name = str(tmp_path / name)
    with pytest.raises(UserError, match=sentence):
        loader(DataConfig(path=name, streaming=True))


def test_no_tensor_is_as_long_as_the_data(config: DataConfig) -> None:
    """The order of an epoch and the sequences are ranges and blocks, not lists."""
    made = loader(config)
    assert isinstance(made.sequences.rows, range)
    assert isinstance(made.sequences.starts, range)
    assert not any(isinstance(value, torch.Tensor) for value in vars(made.order).values())
