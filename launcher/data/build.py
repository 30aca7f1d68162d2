"""The loaders of training and evaluation, from the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.config.schema.data import DataConfig
from launcher.config.schema.training import TrainingConfig
from launcher.data import source
from launcher.data.dataset import TokenizedDataset, TokenizedRows, load_data, load_evaluation
from launcher.data.loader import Loader
from launcher.data.mixing import RowNumbers, mix_sources, split_rows
from launcher.data.packing import Sequences, one_row_each, pack
from launcher.data.sampler import (
    BlockShuffleSampler,
    LengthGroupedSampler,
    RandomSampler,
    Sampler,
    sequential,
)
from launcher.data.streaming import StreamedRows
from launcher.data.tokenize import RowTokenizer

SECONDS_BETWEEN_LINES = 5.0

LoaderFactory = Callable[..., Loader]  # takes the rows, sequences and sampler


@dataclass(frozen=True)
class Loaders:
    training: Loader
    evaluation: Loader | None
    fingerprint: str  # of the rows to train on


def build_loaders(
    config: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
    world_size: int,
    say: Callable[[str], None],
    check: Callable[[], None],
    vocabulary_size: int | None = None,
) -> Loaders:
    """Tokenize the data of `config`, or read it from the cache, and build the loaders of one rank.

    `say` receives log lines. `check` is called regularly; if it raises, the work stops. A row with
    a token beyond `vocabulary_size` is bad. Raises UserError for data that cannot be trained on.
    """
    new_loader = partial(
        Loader,
        rank=rank,
        world_size=world_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        pad_to_multiple_of=config.pad_to_multiple_of,
        pad_token_id=tokenizer.pad_token_id or 0,
        packed=config.packing,
    )
    on_progress = TokenizationProgress(say, check)
    evaluation = None
    if config.eval_path:
        for note in source.file_notes(source.evaluation_config(config)):
            say(note)
        dataset = load_evaluation(config, tokenizer, on_progress, vocabulary_size, say)
        say(f"evaluation data: {dataset.describe()}")
        numbers = np.arange(len(dataset.rows))
        evaluation = _evaluation_loader(dataset.rows, numbers, config, new_loader)
    for note in source.file_notes(config):
        say(note)
    if config.streaming:
        sources = source.resolve_sources(config).values()
        tokenizers = [RowTokenizer(each, config, tokenizer, vocabulary_size) for each in sources]
        rows = StreamedRows(tokenizers, say)
        say(f"data: {len(rows):,} rows, tokenized while training")
        loader = _streaming_loader(rows, config, training.seed, new_loader)
        return Loaders(loader, evaluation, rows.fingerprint)
    dataset = load_data(config, tokenizer, on_progress, vocabulary_size, say)
    say(f"data: {dataset.describe()}")
    training_numbers, eval_numbers = split_rows(len(dataset.rows), config, training.seed)
    if len(eval_numbers):
        evaluation = _evaluation_loader(dataset.rows, eval_numbers, config, new_loader)
    loader = _training_loader(dataset, training_numbers, config, training.seed, new_loader, say)
    return Loaders(loader, evaluation, dataset.fingerprint)


def rebuild_loader(loader: Loader, config: DataConfig, seed: int) -> Loader:
    """A loader over the same tokenized rows, with the packing, grouping and shuffling of
    `config`."""
    assert isinstance(loader.rows, TokenizedRows)
    numbers = np.sort(np.asarray(loader.sequences.rows))
    return _with_sequences(loader, loader.rows, numbers, config, seed)


def _training_loader(
    dataset: TokenizedDataset,
    numbers: RowNumbers,
    config: DataConfig,
    seed: int,
    new_loader: LoaderFactory,
    say: Callable[[str], None],
) -> Loader:
    sources = source.resolve_sources(config)
    numbers = mix_sources(numbers, dataset.sizes, sources, config, seed)
    if config.mixing == "interleave":
        distinct = len(np.unique(numbers))
        say(f"mixing: an epoch draws {len(numbers):,} rows, {distinct:,} of them distinct")
    rows = dataset.rows
    unpacked = new_loader(rows=rows, sequences=one_row_each(numbers), sampler=sequential)
    loader = _with_sequences(unpacked, rows, numbers, config, seed)
    if config.packing:
        say(f"packing: {_describe_packing(loader, rows, config.max_length)}")
    return loader


def _with_sequences(
    loader: Loader, rows: TokenizedRows, numbers: RowNumbers, config: DataConfig, seed: int
) -> Loader:
    """`loader` with sequences of the rows `numbers`, and with their sampler."""
    sequences = _build_sequences(rows, numbers, config)
    sampler: Sampler = sequential
    if config.group_by_length:
        lengths = sequence_lengths(rows, sequences)
        sampler = LengthGroupedSampler(seed, lengths, loader.global_batch_size)
    elif config.shuffle:
        sampler = RandomSampler(seed, len(sequences))
    return replace(loader, sequences=sequences, sampler=sampler, packed=config.packing)


def _streaming_loader(
    rows: StreamedRows, config: DataConfig, seed: int, new_loader: LoaderFactory
) -> Loader:
    return new_loader(
        rows=rows,
        sequences=one_row_each(range(len(rows))),
        sampler=BlockShuffleSampler(seed, len(rows)) if config.shuffle else sequential,
        step_packing_length=config.max_length if config.packing else None,
    )


def _evaluation_loader(
    rows: TokenizedRows, numbers: RowNumbers, config: DataConfig, new_loader: LoaderFactory
) -> Loader:
    sequences = _build_sequences(rows, numbers, config)
    return new_loader(rows=rows, sequences=sequences, sampler=sequential)


def _build_sequences(rows: TokenizedRows, numbers: RowNumbers, config: DataConfig) -> Sequences:
    if not config.packing:
        return one_row_each(numbers)
    return pack(numbers, rows.lengths[numbers], config.max_length)


def sequence_lengths(rows: TokenizedRows, sequences: Sequences) -> NDArray[np.int64]:
    """Tokens of each sequence, [sequences] int64."""
    ends = np.cumsum(np.concatenate([[0], rows.lengths[np.asarray(sequences.rows)]]))
    lengths: NDArray[np.int64] = np.diff(ends[np.asarray(sequences.starts)])
    return lengths


def _describe_packing(loader: Loader, rows: TokenizedRows, capacity: int) -> str:
    sequences = loader.sequences
    tokens = int(sequence_lengths(rows, sequences).sum())
    fill = tokens / (len(sequences) * capacity)
    rows_per_step = len(sequences.rows) / len(sequences) * loader.global_batch_size
    return (
        f"{len(sequences.rows):,} rows in {len(sequences):,} sequences of {capacity} tokens, "
        f"{fill:.1%} full; a step trains on about {rows_per_step:,.0f} rows"
    )


class TokenizationProgress:
    """Logs the number of rows that have been tokenized, every five seconds."""

    def __init__(self, say: Callable[[str], None], check: Callable[[], None]) -> None:
        """`check` is called for each chunk of rows; it may raise to stop the work."""
        self.say = say
        self.check = check
        self._started = self._last_line = time.monotonic()

    def __call__(self, done: int) -> None:
        self.check()
        now = time.monotonic()
        if done == 0:
            self._started = self._last_line = now
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = done / (now - self._started)
            self.say(f"tokenizing: {done:,} rows, {rate:,.0f} rows/s")
