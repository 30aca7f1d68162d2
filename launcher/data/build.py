"""From the configuration to the batches of training and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from launcher.config.data import DataConfig
from launcher.data import source
from launcher.data.dataset import Rows, load_data, load_evaluation
from launcher.data.loader import Loader, RowSource
from launcher.data.order import Blocks, Grouped, Order, Shuffled, in_order
from launcher.data.packing import Sequences, one_each, pack
from launcher.data.selection import Numbers, mix, split
from launcher.data.stream import Streamed
from launcher.data.tokenise import Tokeniser

SECONDS_BETWEEN_LINES = 5.0

Deal = Callable[..., Loader]  # a Loader but for its rows, sequences and order


@dataclass(frozen=True)
class Loaders:
    training: Loader
    evaluation: Loader | None
    fingerprint: str  # of the rows


def build_loaders(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    deal: Deal,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> Loaders:
    """Read and tokenise, or find in the cache, what `config` names.

    `check` is called now and then; what it raises ends the work. Raises UserError for data that
    cannot be learnt from.
    """
    deal = partial(
        deal,
        pad_to_multiple_of=config.pad_to_multiple_of,
        pad_token_id=tokenizer.pad_token_id or 0,
        packed=config.packing,
    )
    on_rows = Tally(say, check)
    evaluation = None
    if config.eval_path:
        held_out = load_evaluation(config, tokenizer, on_rows)
        say(f"evaluation data: {held_out.describe()}")
        evaluation = _in_order(held_out.rows, np.arange(len(held_out.rows)), config, deal)
    if config.streaming:
        named = source.sources_of(config).values()
        tokenisers = [Tokeniser(each, config, tokenizer) for each in named]
        streamed = Streamed(tokenisers, say)
        say(f"data: {len(streamed):,} rows, tokenised as they come")
        training = _streaming(streamed, config, seed, deal)
        return Loaders(training, evaluation, streamed.fingerprint)
    data = load_data(config, tokenizer, on_rows)
    say(f"data: {data.describe()}")
    chosen, held = split(len(data.rows), config, seed)
    if len(held):
        evaluation = _in_order(data.rows, held, config, deal)
    sources = source.sources_of(config)
    numbers = mix(chosen, data.sizes, sources, config, seed)
    if config.mixing == "interleave":
        apart = len(np.unique(numbers))
        say(f"mixing: an epoch draws {len(numbers):,} rows, {apart:,} different ones")
    plain = deal(rows=data.rows, sequences=one_each(numbers), order=in_order)
    training = _stored(plain, data.rows, numbers, config, seed)
    if config.packing:
        say(f"packing: {describe_packing(training, config.max_length)}")
    return Loaders(training, evaluation, data.fingerprint)


def arrange(loader: Loader, config: DataConfig, seed: int) -> Loader:
    """`loader` over the same rows, packed, grouped by length or as they come."""
    assert isinstance(loader.rows, Rows)
    numbers = np.sort(np.asarray(loader.sequences.rows))
    return _stored(loader, loader.rows, numbers, config, seed)


def _stored(loader: Loader, rows: Rows, numbers: Numbers, config: DataConfig, seed: int) -> Loader:
    sequences = _sequences(rows, numbers, config)
    order: Order = in_order
    if config.group_by_length:
        order = Grouped(seed, sequence_lengths(rows, sequences), loader.global_batch_size)
    elif config.shuffle:
        order = Shuffled(seed, len(sequences))
    return replace(loader, sequences=sequences, order=order, packed=config.packing)


def _streaming(streamed: Streamed, config: DataConfig, seed: int, deal: Deal) -> Loader:
    return deal(
        rows=streamed,
        sequences=one_each(range(len(streamed))),
        order=Blocks(seed, len(streamed)) if config.shuffle else in_order,
        pack_steps_to=config.max_length if config.packing else None,
    )


def _in_order(rows: RowSource, numbers: Numbers, config: DataConfig, deal: Deal) -> Loader:
    assert isinstance(rows, Rows)
    return deal(rows=rows, sequences=_sequences(rows, numbers, config), order=in_order)


def _sequences(rows: Rows, numbers: Numbers, config: DataConfig) -> Sequences:
    if not config.packing:
        return one_each(numbers)
    return pack(numbers, rows.lengths[numbers], config.max_length)


def sequence_lengths(rows: Rows, sequences: Sequences) -> Numbers:
    """Tokens of each sequence, [sequences] int64."""
    ends = np.cumsum(np.concatenate([[0], rows.lengths[np.asarray(sequences.rows)]]))
    lengths: Numbers = np.diff(ends[np.asarray(sequences.starts)])
    return lengths


def describe_packing(loader: Loader, capacity: int) -> str:
    """For the log."""
    assert isinstance(loader.rows, Rows)
    sequences = loader.sequences
    tokens = int(sequence_lengths(loader.rows, sequences).sum())
    full = tokens / (len(sequences) * capacity)
    return (
        f"{len(sequences.rows):,} rows in {len(sequences):,} sequences of {capacity} tokens, "
        f"{full:.1%} full; a step learns from about "
        f"{len(sequences.rows) / len(sequences) * loader.global_batch_size:,.0f} rows"
    )


class Tally:
    """Says how far the tokeniser is, every five seconds."""

    def __init__(self, say: Callable[[str], None], check: Callable[[], None]) -> None:
        self.say = say
        self.check = check
        self._began = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        self.check()
        now = time.monotonic()
        if done == 0:
            self._began = self._said = now
        elif now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            rate = done / (now - self._began)
            self.say(f"tokenising: {done:,} rows, {rate:,.0f} rows/s")
