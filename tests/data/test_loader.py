"""How sequences are distributed to ranks and arranged in batches."""

from __future__ import annotations

import threading
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.config.schema.data import DataConfig
from launcher.data.collate import IGNORED, MicroBatch, collate
from launcher.data.dataset import TokenizedRows, load_data
from launcher.data.loader import Loader
from launcher.data.packing import one_row_each, pack
from launcher.data.prefetch import Prefetcher
from launcher.data.sampler import RandomSampler, sequential
from launcher.model.tiny import byte_tokenizer


@pytest.fixture
def rows(rows_file: Path) -> TokenizedRows:
    return load_data(DataConfig(path=str(rows_file), max_length=96), byte_tokenizer()).rows


def deal(
    rows: TokenizedRows,
    rank: int = 0,
    world_size: int = 1,
    micro: int = 2,
    batch: int = 6,
    **options: Any,
) -> Loader:
    options = {
        "sequences": one_row_each(range(len(rows))),
        "sampler": RandomSampler(5, len(rows)),
        "pad_to_multiple_of": 8,
        **options,
    }
    return Loader(
        rows=rows, rank=rank, world_size=world_size, micro_batch_size=micro,
        global_batch_size=batch, pad_token_id=0, **options,
    )  # fmt: skip


def targets(loader: Any, step: int) -> list[list[int]]:
    """The target tokens of a step, sequence by sequence, without padding."""
    return [
        row[row != IGNORED].tolist()
        for batch in loader.step_batch(step).micro_batches
        for row in by_place(batch)
        if (row != IGNORED).any()
    ]


def by_place(batch: MicroBatch) -> torch.Tensor:
    """The token to predict at each position [sequences, length], or IGNORED."""
    real = batch.target_ids != IGNORED
    places = torch.full_like(batch.input_ids, IGNORED)
    places.view(-1)[batch.target_positions[real]] = batch.target_ids[real]
    return places


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (5, 1)])
def test_the_rows_of_a_step_do_not_depend_on_the_world_size(
    rows: TokenizedRows, world: int, micro: int
) -> None:
    alone = deal(rows, micro=30, batch=30)
    for step in (0, 1):
        loaders = [deal(rows, rank, world, micro, 30) for rank in range(world)]
        dealt = [row for loader in loaders for row in targets(loader, step)]
        assert sorted(dealt) == sorted(targets(alone, step))
        counts = {len(loader.step_batch(step).micro_batches) for loader in loaders}
        assert len(counts) == 1, "ranks meet in collectives equally often"
        total = sum(int(loader.step_batch(step).target_tokens) for loader in loaders)
        assert total == sum(map(len, targets(alone, step)))


def test_the_last_step_of_an_epoch_has_the_remaining_rows(rows: TokenizedRows) -> None:
    loader = deal(rows)
    assert loader.steps_per_epoch == 3
    assert [len(targets(loader, step)) for step in range(4)] == [6, 6, 1, 6]
    epoch = [row for step in range(3) for row in targets(loader, step)]
    again = [row for step in range(3, 6) for row in targets(loader, step)]
    assert sorted(epoch) == sorted(again), "every row once an epoch"
    assert epoch != again, "in another order"


def test_targets_are_the_next_tokens(rows: TokenizedRows) -> None:
    batch = deal(rows, micro=13, batch=13, sampler=sequential).step_batch(0).micro_batches[0]
    assert batch.input_ids.shape[1] % 8 == 0
    assert batch.documents is None
    assert len(batch.target_positions) == len(batch.target_ids)
    assert len(batch.target_positions) % 64 == 0, "few shapes"
    predicted = by_place(batch)
    longest_first = sorted(range(13), key=lambda row: -len(rows[row][0]))
    for row in range(13):
        ids, trained = rows[longest_first[row]]
        for place in range(batch.input_ids.shape[1]):
            if place + 1 < len(ids) and trained[place + 1]:
                assert predicted[row, place] == ids[place + 1]
            else:
                assert predicted[row, place] == IGNORED


def test_rows_of_similar_length_share_a_micro_batch(rows: TokenizedRows) -> None:
    """This gives less padding than the original order, and ranks wait less for each other."""
    loaders = [deal(rows, rank, 2, 2, 12) for rank in range(2)]
    shapes = [
        [batch.input_ids.shape[1] for batch in loader.step_batch(0).micro_batches]
        for loader in loaders
    ]
    assert all(lengths == sorted(lengths, reverse=True) for lengths in shapes)
    in_order = targets(deal(rows, micro=12, batch=12), 0)
    assert len(in_order) == 12
    for rank, loader in enumerate(loaders):
        assert targets(loader, 0) == in_order[rank::2], "dealt like cards, the longest first"
    longest = [max(lengths) for lengths in shapes]
    assert longest[0] - longest[1] <= 8
    chosen = loaders[0].sampler(0, 0, 12)
    unsorted_padding = sum(
        2 * max(len(rows[a][0]), len(rows[b][0]))
        for a, b in zip(chosen[::2], chosen[1::2], strict=True)
    )
    assert sum(2 * length for lengths in shapes for length in lengths) < unsorted_padding


def packed(rows: TokenizedRows, rank: int = 0, world_size: int = 1, **options: Any) -> Loader:
    sequences = pack(np.arange(len(rows)), rows.lengths, 96)
    order = RandomSampler(5, len(sequences))
    options = {"sequences": sequences, "sampler": order, "packed": True, **options}
    return deal(rows, rank, world_size, micro=2, batch=4, **options)


def test_packed_sequences_contain_every_row_once_with_its_own_targets(rows: TokenizedRows) -> None:
    """Targets equal those of unpacked rows; no document's last token predicts the next document."""
    loader = packed(rows)
    dealt = [row for step in range(loader.steps_per_epoch) for row in targets(loader, step)]
    alone = targets(deal(rows, micro=13, batch=13), 0)
    assert sum(map(len, dealt)) == sum(map(len, alone))
    assert sorted(i for row in dealt for i in row) == sorted(i for row in alone for i in row)
    assert len(loader.sequences) < 13
    two = [packed(rows, rank, 2) for rank in range(2)]
    assert sorted(targets(two[0], 0) + targets(two[1], 0)) == sorted(targets(loader, 0))


def test_documents_give_the_position_of_each_row(rows: TokenizedRows) -> None:
    a, b, c = (rows[number] for number in (0, 1, 2))
    batch = collate([[a, b], [c]], multiple=64, pad_token_id=0, packed=True)
    documents = batch.documents
    assert documents is not None
    width = batch.input_ids.shape[1]
    sizes = [len(ids) for ids, _ in (a, b, c)]
    pads = [width - sizes[0] - sizes[1], width - sizes[2]]
    assert documents.lengths == (sizes[0], sizes[1], pads[0], sizes[2], pads[1])
    assert documents.cu_seqlens.tolist() == np.cumsum([0, *documents.lengths]).tolist()
    expected = [place for length in documents.lengths for place in range(length)]
    assert documents.position_ids.flatten().tolist() == expected
    assert batch.input_ids[0, sizes[0] : sizes[0] + sizes[1]].tolist() == b[0].tolist()
    assert by_place(batch)[0, sizes[0] - 1] == IGNORED, "the first token of b is not predicted"


def test_packing_each_step_gives_the_same_targets_in_fewer_sequences(
    rows: TokenizedRows,
) -> None:
    """Streaming packs this way."""
    loader = deal(rows, packed=True, step_packing_length=96)
    plain = deal(rows)
    for step in range(3):
        step_batch = loader.step_batch(step)
        assert int(step_batch.tokens) == int(plain.step_batch(step).tokens)
        assert int(step_batch.target_tokens) == int(plain.step_batch(step).target_tokens)
        learned, expected = (
            sorted(chain.from_iterable(targets(each, step))) for each in (loader, plain)
        )
        assert learned == expected
    assert len(targets(loader, 0)) < 6


def test_a_batch_without_sequences_is_padding() -> None:
    for is_packed in (False, True):
        batch = collate([], multiple=8, pad_token_id=3, packed=is_packed)
        assert batch.input_ids.tolist() == [[3] * 8]
        assert (batch.target_ids == IGNORED).all()
    assert batch.documents is not None
    assert batch.documents.lengths == (8,)


def test_the_next_step_is_prefetched(rows: TokenizedRows) -> None:
    """Step batches equal those without prefetching; consecutive steps are made once each."""
    loader = deal(rows)
    asked: list[int] = []

    class Counted:
        steps_per_epoch = loader.steps_per_epoch

        def step_batch(self, step: int) -> Any:
            asked.append(step)
            return loader.step_batch(step)

    ahead = Prefetcher(Counted(), torch.device("cpu"))  # type: ignore[arg-type]
    for step in (4, 5, 6, 2):
        found, expected = ahead.step_batch(step), loader.step_batch(step)
        for ours, theirs in zip(found.micro_batches, expected.micro_batches, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert torch.equal(ours.target_ids, theirs.target_ids)
    ahead.step_batch(3)
    assert asked[:4] == [4, 5, 6, 7]
    assert asked.count(2) == asked.count(3) == 1


def test_the_thread_that_pins_batches_uses_the_gpu_of_the_rank(
    rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current GPU of a new thread is number 0."""
    used: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: used.append((threading.current_thread().name, gpu))
    )
    monkeypatch.setattr(MicroBatch, "pin_memory", lambda batch: batch)
    Prefetcher(deal(rows), torch.device("cuda", 3)).step_batch(0)
    assert used == [("data_0", torch.device("cuda", 3))]
