"""What is learnt of a conversation, and how rows are dealt to ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config.data import DataConfig
from launcher.data import dataset
from launcher.data.chat import tokenize
from launcher.data.dataset import load_rows, split
from launcher.data.loader import IGNORED, Loader, MicroBatch
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "TWO"},
]


def learnt(tokens: Any, tokenizer: Any) -> str:
    ids = [i for i, t in zip(tokens.ids, tokens.trained, strict=True) if t]
    return str(tokenizer.decode(ids))


def test_every_answer_is_learnt_up_to_its_end_and_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenize(tokenizer, TALK, 1000, "here")
    assert learnt(tokens, tokenizer) == "ONE<|im_end|>TWO<|im_end|>"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(tokens.ids) == whole
    assert tokens.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_question_after_the_last_answer_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenize(tokenizer, TALK[:4], 1000, "here")
    assert "two?" not in tokenizer.decode(tokens.ids)


def test_a_long_row_is_cut() -> None:
    tokenizer = byte_tokenizer()
    whole = tokenize(tokenizer, TALK, 1000, "here")
    cut = tokenize(tokenizer, TALK, 50, "here")
    assert cut.ids == whole.ids[:50]
    assert cut.trained == whole.trained[:50]


def test_a_template_that_rewrites_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        tokenize(tokenizer, TALK, 100, "row 7")


def test_what_a_template_raises_is_told_with_the_row() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(UserError, match=r"row 7: .*no system, please"):
        tokenize(tokenizer, TALK, 100, "row 7")


def test_tokenising_happens_once_for_the_same_content(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path))
    calls = []
    original = dataset._tokenize_file
    monkeypatch.setattr(dataset, "_tokenize_file", lambda *args: calls.append(1) or original(*args))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows_file.read_text())
    config = DataConfig(path="", max_length=64)
    first = load_rows(rows_file, config, byte_tokenizer())
    again = load_rows(copy, config, byte_tokenizer())
    assert len(calls) == 1, "another path with the same content"
    assert torch.equal(first.ids, again.ids)
    load_rows(copy, DataConfig(path="", max_length=65), byte_tokenizer())
    copy.write_text(rows_file.read_text() + rows_file.read_text())
    assert len(load_rows(copy, config, byte_tokenizer())) == 2 * len(first)
    other = byte_tokenizer()
    other.chat_template += "{# changed #}"
    load_rows(copy, config, other)
    other.eos_token = "<|endoftext|>"
    load_rows(copy, config, other)
    assert len(calls) == 5, "another length, a changed file, another template, another end"


def test_rows_without_an_answer_in_reach_are_counted_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path))
    path = tmp_path / "rows.jsonl"
    long = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]
    path.write_text("\n".join(json.dumps({"messages": m}) for m in (TALK, long)) + "\n")
    rows = load_rows(path, DataConfig(path="", max_length=100), byte_tokenizer())
    assert (len(rows), rows.dropped, rows.truncated) == (1, 1, 1)
    assert "1 rows left out" in rows.describe()
    with pytest.raises(UserError, match=r"no answer lies within data\.max_length=20"):
        load_rows(path, DataConfig(path="", max_length=20), byte_tokenizer())


def test_splitting_holds_rows_out_for_good(rows_file: Path) -> None:
    rows = load_rows(rows_file, DataConfig(path="", max_length=64), byte_tokenizer())
    training, held_out = split(rows, 4, seed=1)
    assert sorted([*training, *held_out]) == list(range(13))
    assert split(rows, 4, seed=1) == (training, held_out)
    assert split(rows, 4, seed=2) != (training, held_out)
    with pytest.raises(UserError, match=r"data\.eval_rows=13 leaves nothing"):
        split(rows, 13, seed=1)


def deal(rows: Any, rank: int, world_size: int, micro: int, batch: int, seed: int | None) -> Loader:
    return Loader(
        rows, range(len(rows)), rank, world_size, micro, batch,
        pad_to_multiple_of=8, pad_token_id=0, seed=seed,
    )  # fmt: skip


def targets(loader: Loader, step: int) -> list[list[int]]:
    """The target tokens of a step, row by row, without padding."""
    return [
        row[row != IGNORED].tolist()
        for batch in loader.window(step).micro_batches
        for row in by_place(batch)
        if (row != IGNORED).any()
    ]


def by_place(batch: MicroBatch) -> torch.Tensor:
    """The token to predict at each place [rows, length], or IGNORED."""
    real = batch.target_ids != IGNORED
    places = torch.full_like(batch.input_ids, IGNORED)
    places.view(-1)[batch.target_at[real]] = batch.target_ids[real]
    return places


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (5, 1)])
def test_a_step_s_rows_do_not_depend_on_the_ranks(rows_file: Path, world: int, micro: int) -> None:
    rows = load_rows(rows_file, DataConfig(path="", max_length=96), byte_tokenizer())
    alone = deal(rows, 0, 1, 30, 30, seed=5)
    for step in (0, 1):
        loaders = [deal(rows, rank, world, micro, 30, seed=5) for rank in range(world)]
        dealt = [row for loader in loaders for row in targets(loader, step)]
        assert sorted(dealt) == sorted(targets(alone, step))
        counts = {len(loader.window(step).micro_batches) for loader in loaders}
        assert len(counts) == 1, "ranks meet in collectives equally often"
        total = sum(int(loader.window(step).target_tokens) for loader in loaders)
        assert total == sum(map(len, targets(alone, step)))


def test_the_last_step_of_an_epoch_takes_what_is_left(rows_file: Path) -> None:
    rows = load_rows(rows_file, DataConfig(path="", max_length=96), byte_tokenizer())
    loader = deal(rows, 0, 1, 2, 6, seed=5)
    assert loader.steps_per_epoch == 3
    assert [len(targets(loader, step)) for step in range(4)] == [6, 6, 1, 6]
    epoch = [row for step in range(3) for row in targets(loader, step)]
    again = [row for step in range(3, 6) for row in targets(loader, step)]
    assert sorted(epoch) == sorted(again), "every row once an epoch"
    assert epoch != again, "in another order"


def test_targets_are_the_next_tokens(rows_file: Path) -> None:
    rows = load_rows(rows_file, DataConfig(path="", max_length=96), byte_tokenizer())
    batch = deal(rows, 0, 1, 13, 13, seed=None).window(0).micro_batches[0]
    assert batch.input_ids.shape[1] % 8 == 0
    assert len(batch.target_at) == len(batch.target_ids)
    assert len(batch.target_at) % 64 == 0, "few shapes"
    targets = by_place(batch)
    longest_first = sorted(range(13), key=lambda row: -len(rows[row][0]))
    for row in range(13):
        ids, trained = rows[longest_first[row]]
        for place in range(batch.input_ids.shape[1]):
            if place + 1 < len(ids) and trained[place + 1]:
                assert targets[row, place] == ids[place + 1]
            else:
                assert targets[row, place] == IGNORED


def test_rows_of_like_length_meet(rows_file: Path) -> None:
    """Less padding than in the order they come, and ranks that wait less for each other."""
    rows = load_rows(rows_file, DataConfig(path="", max_length=96), byte_tokenizer())
    loaders = [deal(rows, rank, 2, 2, 12, seed=5) for rank in range(2)]
    shapes = [
        [batch.input_ids.shape[1] for batch in loader.window(0).micro_batches] for loader in loaders
    ]
    assert all(lengths == sorted(lengths, reverse=True) for lengths in shapes)
    longest = [max(lengths) for lengths in shapes]
    assert longest[0] - longest[1] <= 8
    chosen = loaders[0]._rows(0, 0, 12)
    unsorted_padding = sum(
        2 * max(len(rows[a][0]), len(rows[b][0]))
        for a, b in zip(chosen[::2], chosen[1::2], strict=True)
    )
    assert sum(2 * length for lengths in shapes for length in lengths) < unsorted_padding
