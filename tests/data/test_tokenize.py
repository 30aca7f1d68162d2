"""Rows are tokenized once, in order, and cached by content."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema.data import DataConfig
from launcher.data import dataset, tokenize, tokenize_source
from launcher.data.dataset import TokenizedDataset, load_data
from launcher.data.template.loss_mask import Tokens
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

TALK = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "ONE"}]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(data: TokenizedDataset) -> list[tuple[list[int], list[bool]]]:
    found = (data.rows[row] for row in range(len(data.rows)))
    return [(ids.tolist(), trained.tolist()) for ids, trained in found]


def many(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            row = {"instruction": f"q{number}", "output": "a" * (1 + number % 40)}
            file.write(json.dumps(row) + "\n")
    return path


def test_tokenizing_happens_once_for_the_same_content(
    rows_file: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = dataset._build
    monkeypatch.setattr(dataset, "_build", lambda *args: calls.append(1) or original(*args))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows_file.read_text())
    config = DataConfig(path=str(rows_file), max_length=64)
    first = load_data(config, byte_tokenizer())
    config = replace(config, path=str(copy))
    again = load_data(config, byte_tokenizer())
    assert len(calls) == 1, "another path with the same content"
    assert content(first) == content(again)
    load_data(replace(config, max_length=65), byte_tokenizer())
    load_data(replace(config, train_on="all"), byte_tokenizer())
    copy.write_text(rows_file.read_text() + rows_file.read_text())
    assert len(load_data(config, byte_tokenizer()).rows) == 2 * len(first.rows)
    other = byte_tokenizer()
    other.chat_template += "{# changed #}"
    load_data(config, other)
    other.eos_token = "<|endoftext|>"
    load_data(config, other)
    assert len(calls) == 6, "another length, mask, a changed file, another template, another end"


def test_worker_processes_return_the_same_rows_in_the_same_order(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(tmp_path / "rows.jsonl", 2500)
    config = DataConfig(path=str(path), max_length=64, workers=1)
    alone = load_data(config, byte_tokenizer())
    for store in (own_cache / "tokens").iterdir():
        store.unlink()
    started = []
    original = tokenize_source._tokenize_in_pool
    monkeypatch.setattr(
        tokenize_source, "_tokenize_in_pool", lambda *a: started.append(a[-1]) or original(*a)
    )
    pooled = load_data(replace(config, workers=2), byte_tokenizer())
    assert started == [2]
    assert content(alone) == content(pooled)
    assert alone.summaries == pooled.summaries


def test_a_bad_row_stops_worker_processes_too(tmp_path: Path, own_cache: Path) -> None:
    path = many(tmp_path / "rows.jsonl", 1200)
    with path.open("a") as file:
        file.write('{"instruction": "q", "output": ""}\n')
    config = DataConfig(path=str(path), max_length=64, workers=2)
    with pytest.raises(UserError, match=r"rows\.jsonl:1201: output is empty"):
        load_data(config, byte_tokenizer())
    assert not list(own_cache.rglob("*.json")), "nothing half done is taken for whole"
    skipped = load_data(replace(config, on_bad_row="skip"), byte_tokenizer())
    assert len(skipped.rows) == 1200
    assert "1 bad rows skipped, the first:" in skipped.describe()
    with pytest.raises(UserError, match=r"rows\.jsonl:1201"):
        load_data(config, byte_tokenizer())


@pytest.mark.parametrize("damage", ["cut", "gone", "told"])
def test_a_damaged_store_is_rebuilt(rows_file: Path, own_cache: Path, damage: str) -> None:
    config = DataConfig(path=str(rows_file), max_length=64)
    before = content(load_data(config, byte_tokenizer()))
    (store,) = own_cache.rglob("*.arrow")
    if damage == "cut":
        store.write_bytes(store.read_bytes()[:-10])
    elif damage == "gone":
        store.unlink()
    else:
        store.with_suffix(".json").write_text("")
    assert content(load_data(config, byte_tokenizer())) == before


def test_the_truncation_state_of_a_tokenizer_is_not_part_of_the_key(
    rows_file: Path, own_cache: Path
) -> None:
    config = DataConfig(path=str(rows_file), max_length=64)
    other = byte_tokenizer()
    other.backend_tokenizer.enable_truncation(5)
    keys = {load_data(config, each).fingerprint for each in (byte_tokenizer(), other)}
    assert len(keys) == 1


def test_if_all_rows_are_bad_the_error_does_not_blame_the_length(
    tmp_path: Path, own_cache: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "q", "output": ""}\n')
    config = DataConfig(path=str(path), max_length=64, on_bad_row="skip")
    with pytest.raises(UserError, match=r"every row is bad, the first: .*: output is empty"):
        load_data(config, byte_tokenizer())


def test_an_exception_between_rows_stops_tokenizing(rows_file: Path, own_cache: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    config = DataConfig(path=str(rows_file), max_length=64)
    with pytest.raises(KeyboardInterrupt):
        load_data(config, byte_tokenizer(), stop)
    assert len(load_data(config, byte_tokenizer()).rows) == 13


def test_rows_without_an_answer_within_max_length_are_counted_and_dropped(
    tmp_path: Path, own_cache: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    long = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]
    path.write_text("\n".join(json.dumps({"messages": m}) for m in (TALK, long)) + "\n")
    data = load_data(DataConfig(path=str(path), max_length=100), byte_tokenizer())
    summary = data.summaries["data"]
    assert (len(data.rows), summary.dropped, summary.truncated) == (1, 1, 1)
    assert "1 rows left out" in data.describe()
    with pytest.raises(UserError, match=r"no answer lies within data\.max_length=10"):
        load_data(DataConfig(path=str(path), max_length=10), byte_tokenizer())


def test_a_row_is_left_out_if_only_its_first_token_is_in_the_loss() -> None:
    """No position predicts the first token: a target is always the next token."""
    first, second = (
        Tokens([7, 8], loss_mask, truncated=False) for loss_mask in ([True, False], [False, True])
    )
    made = tokenize.make_batch([first, second], [], concatenated=False)
    assert (made.dropped, made.lengths.tolist(), made.loss_mask.tolist()) == (1, [2], [False, True])
    whole = tokenize.make_batch([first, second], [], concatenated=True)
    assert (whole.dropped, whole.lengths.tolist()) == (0, [2, 2])


def test_several_sources_are_stored_in_sequence(
    rows_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    more = many(tmp_path / "more.jsonl", 5)
    config = DataConfig(
        max_length=64, sources={"a": {"path": str(rows_file)}, "b": {"path": str(more)}}
    )
    data = load_data(config, byte_tokenizer())
    assert data.sizes == [13, 5]
    single = [
        load_data(DataConfig(path=str(path), max_length=64), byte_tokenizer())
        for path in (rows_file, more)
    ]
    assert content(data) == content(single[0]) + content(single[1])
    assert len({data.fingerprint, *(each.fingerprint for each in single)}) == 3


def test_rows_are_not_held_in_memory(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tokenized in batches and mapped from the disk."""
    monkeypatch.setattr(tokenize_source, "CHUNK_ROWS", 50)
    path = many(tmp_path / "rows.jsonl", 5_000)
    config = DataConfig(path=str(path), max_length=64, workers=1)
    load_data(replace(config, max_rows=1), byte_tokenizer())  # imports, compiled templates
    tracemalloc.start()
    data = load_data(config, byte_tokenizer())
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stored = data.summaries["data"].tokens * 5
    assert stored > 1_000_000
    assert held < stored / 4, "what stays is where rows begin"
    read_at_once = 1 << 20  # of the file, for its hash
    assert peak < stored / 2 + read_at_once, "Python's objects of one batch, not of all"


def test_ids_and_masks_are_what_was_tokenized(rows_file: Path) -> None:
    data = load_data(DataConfig(path=str(rows_file), max_length=64), byte_tokenizer())
    assert data.rows[0][0].dtype == np.int32
    assert data.rows[0][1].dtype == np.bool_
    assert [len(data.rows[row][0]) for row in range(13)] == data.rows.lengths.tolist()
    learned: Any = sum(int(data.rows[row][1].sum()) for row in range(13))
    assert learned == data.summaries["data"].loss_tokens


def test_special_tokens_in_texts_are_named(own_cache: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    special = next(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    path = tmp_path / "rows.jsonl"
    answers = ["plain", f"and {special} then"]
    path.write_text(
        "".join(json.dumps({"instruction": "q", "output": text}) + "\n" for text in answers)
    )
    (summary,) = load_data(DataConfig(path=str(path)), tokenizer).summaries.values()
    assert summary.notes == {tokenize.SPECIAL_TOKENS: 1}


ENDLESS = (
    "{%- for m in messages %}{% if 'forever' in m.content %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def endless_rows(path: Path, *questions: str) -> DataConfig:
    talks = [[{**TALK[0], "content": question}, TALK[1]] for question in questions]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return DataConfig(path=str(path), max_length=64, row_seconds=0.2, workers=1)


def test_a_row_that_never_ends_is_a_bad_row_with_its_number(
    tmp_path: Path, own_cache: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS
    config = endless_rows(tmp_path / "rows.jsonl", "a", "forever", "b")
    with pytest.raises(UserError, match=r"rows.jsonl:2: the chat template takes more than 0.2 s"):
        load_data(config, tokenizer)
    data = load_data(replace(config, on_bad_row="skip"), tokenizer)
    (summary,) = data.summaries.values()
    assert (summary.rows, summary.skipped) == (2, 1)
    assert f"{config.path}:2: the chat template takes more than 0.2 s" in summary.errors[0]


def test_a_template_that_never_ends_does_not_cost_the_limit_for_each_row(
    tmp_path: Path, own_cache: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS
    config = endless_rows(tmp_path / "rows.jsonl", *["forever"] * 1000)
    message = r":3: the chat template takes more than 0.2 s for this row \(and so did .*:1, .*:2\)"
    with pytest.raises(UserError, match=message):
        load_data(replace(config, on_bad_row="skip"), tokenizer)


def test_a_template_whose_probing_never_ends_is_refused(tmp_path: Path, own_cache: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS.replace("'forever' in m.content", "true")
    config = endless_rows(tmp_path / "rows.jsonl", "a")
    with pytest.raises(UserError, match=r":1: the chat template takes more than 0.2 s"):
        load_data(config, tokenizer)
