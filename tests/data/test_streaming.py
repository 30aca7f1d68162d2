"""Rows tokenized during training equal the rows that would have been stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from launcher.config.schema.data import DataConfig
from launcher.config.schema.training import TrainingConfig
from launcher.data.build import Loaders, build_loaders
from launcher.data.loader import Loader
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
    [("a.json", "cannot be read by number"), ("hub:a/b", "is downloaded completely")],
)
def test_a_source_that_cannot_be_streamed_is_refused(
    tmp_path: Path, name: str, sentence: str
) -> None:
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
    assert not any(isinstance(value, torch.Tensor) for value in vars(made.sampler).values())
