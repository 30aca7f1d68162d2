"""Tokenized rows, built once and cached by content.

Each source has two files in the cache: Arrow record batches with the token ids and loss masks of
its rows, and a JSON summary with their checksum (`folders/checked_cache.py`). The record batches
are memory-mapped: the ranks of a machine share the pages, and no rank holds all rows in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.config.schema.data import DataConfig
from launcher.data import source
from launcher.data.rows.columns import IGNORED
from launcher.data.summary import Summary
from launcher.data.tokenize import (
    SPECIAL_TOKENS,
    RowTokenizer,
    TokenBatch,
)
from launcher.data.tokenize_source import tokenize_source
from launcher.errors import UserError
from launcher.folders import checked_cache, paths
from launcher.io import arrow

FORMAT = "3"  # part of every fingerprint: a run resumes only with the same one
TOKENIZATION = "4"  # part of the names of cached files: increase it when tokenization changes
# The names on disk; `trained` is the loss mask.
SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.uint8()))])

Row = tuple[NDArray[np.int32], NDArray[np.bool_]]  # token ids [n], loss mask [n]
OnProgress = Callable[[int], None]
Say = Callable[[str], None]


class TokenizedRows:
    """Rows of token ids in memory-mapped chunks, by row number."""

    def __init__(self, arrow_files: Sequence[Path]) -> None:
        # (offsets [rows + 1], token ids [total], loss mask [total]) of each record batch
        self._chunks: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]] = []
        for file in arrow_files:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            for number in range(reader.num_record_batches):
                ids, loss_mask = reader.get_batch(number).columns
                mask_values = arrow.values(loss_mask.values, np.uint8).view(np.bool_)
                offsets = arrow.values(ids.offsets, np.int32)
                values = arrow.values(ids.values, np.int32)
                self._chunks.append((offsets, values, mask_values))
        lengths = [np.diff(offsets) for offsets, _, _ in self._chunks]
        self._first_rows = np.cumsum([0, *map(len, lengths)])  # number of each chunk's first row
        self.lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int32)  # [rows]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Row:
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        offsets, ids, loss_mask = self._chunks[chunk]
        index = row - self._first_rows[chunk]
        begin, end = offsets[index], offsets[index + 1]
        return ids[begin:end], loss_mask[begin:end]

    def length(self, row: int) -> int:
        return int(self.lengths[row])


@dataclass(frozen=True)
class TokenizedDataset:
    """The rows of all sources, concatenated in the order of the sources."""

    rows: TokenizedRows
    summaries: dict[str, Summary]  # by name of the source
    fingerprint: str  # of the content of the files, the tokenizer and the options

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each source."""
        return [summary.rows for summary in self.summaries.values()]

    def describe(self) -> str:
        if len(self.summaries) == 1:
            return next(iter(self.summaries.values())).describe()
        lines = [f"{name}: {summary.describe()}" for name, summary in self.summaries.items()]
        total = f"{len(self.rows):,} rows of {len(self.sizes)} sources"
        return "\n      ".join([total, *lines])


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: OnProgress = lambda rows_read: None,
    vocabulary_size: int | None = None,
    say: Say = lambda line: None,
) -> TokenizedDataset:
    """Tokenize the sources of `config`, or read them from the cache if they were tokenized before.

    The cache key depends on the content of the files, the tokenizer, its chat template and the
    options, so a changed file is noticed. One process of a machine tokenizes (with its worker
    processes); the others wait for its lock. `on_progress` receives the number of rows read so far;
    if it raises, the work stops and nothing is cached. A row with a token beyond `vocabulary_size`
    is bad. `say` receives log lines about the cache. Raises UserError if a source has no row to
    train on.
    """
    arrow_files, summaries, keys = [], {}, []
    for name, source_config in source.resolve_sources(config).items():
        row_tokenizer = RowTokenizer(source_config, config, tokenizer, vocabulary_size)
        key = cache_key(row_tokenizer, source.iter_content(source_config))
        arrow_file = paths.cache() / "tokens" / f"{_file_key(key, row_tokenizer)}.arrow"
        summary = _tokenize_once(arrow_file, row_tokenizer, on_progress, say)
        keys.append(" ".join([key, *_differences(row_tokenizer, summary)]))
        summaries[name] = summary
        arrow_files.append(arrow_file)
    rows = TokenizedRows(arrow_files)
    for name, summary in summaries.items():
        if not summary.rows:
            where = f"data.path={config.path}" if len(summaries) == 1 else f"data source {name}"
            raise UserError(f"{where}: {_why_empty(summary, config.max_length)}")
    fingerprint = keys[0] if len(keys) == 1 else xxhash.xxh3_128_hexdigest("".join(keys).encode())
    return TokenizedDataset(rows, summaries, fingerprint)


def _differences(row_tokenizer: RowTokenizer, summary: Summary) -> Iterator[str]:
    """How the rows differ from those of version 0.1.0, whose runs resume only with the same ones:
    it cut rows that are too long, joined no turns and learned every answer."""
    if summary.too_long or summary.split:
        yield row_tokenizer.too_long
    same = (IGNORED, SPECIAL_TOKENS)
    yield from (note for note in summary.notes if not note.endswith(same))


def _why_empty(summary: Summary, max_length: int) -> str:
    if summary.too_long and not summary.dropped:
        return (
            f"every row is longer than data.max_length={max_length} → increase it, or "
            "data.too_long=cut"
        )
    if summary.errors and not summary.dropped:
        return f"every row is bad, the first: {summary.errors[0]}"
    return f"no answer lies within data.max_length={max_length}; increase it"


def load_evaluation(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: OnProgress = lambda rows_read: None,
    vocabulary_size: int | None = None,
    say: Say = lambda line: None,
) -> TokenizedDataset:
    """The rows of `data.eval_path`, as `load_data` loads them."""
    evaluation = source.evaluation_config(config)
    return load_data(evaluation, tokenizer, on_progress, vocabulary_size, say)


def _tokenize_once(
    arrow_file: Path, row_tokenizer: RowTokenizer, on_progress: OnProgress, say: Say
) -> Summary:
    """The summary of `arrow_file`; the file is built first if it is missing or damaged."""
    facts = checked_cache.ensure(
        arrow_file,
        lambda partial: _build(partial, row_tokenizer, on_progress),
        Summary.from_facts,
        say,
        lambda: on_progress(0),
    )
    summary = Summary.from_facts(facts)
    if summary.skipped and row_tokenizer.config.on_bad_row == "fail":
        raise UserError(summary.errors[0])
    return summary


def _build(partial: Path, row_tokenizer: RowTokenizer, on_progress: OnProgress) -> dict[str, Any]:
    summary = Summary()
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in tokenize_source(row_tokenizer, row_tokenizer.config.workers, on_progress):
            summary = summary.add(batch)
            if len(batch.lengths):
                writer.write_batch(_record_batch(batch))
    return summary.facts()


def _record_batch(batch: TokenBatch) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32))
    values = (pa.array(batch.ids), pa.array(batch.loss_mask.view(np.uint8)))
    columns = [pa.ListArray.from_arrays(offsets, column) for column in values]
    return pa.record_batch(columns, schema=SCHEMA)


def cache_key(row_tokenizer: RowTokenizer, content: Iterable[bytes]) -> str:
    """A hash of everything that tokenized rows depend on; `content` is that of the files.

    What a setting does by default adds nothing, so that runs of earlier versions can resume.
    """
    config, source_config = row_tokenizer.config, row_tokenizer.source
    tokenizer = row_tokenizer.tokenizer
    backend = repr(tokenizer)
    if tokenizer.is_fast:  # without the truncation and padding of the tokenizer's last call
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        backend = json.dumps({**parts, "truncation": None, "padding": None})
    special = sorted(tokenizer.special_tokens_map.items())  # templates and loss masks use them
    columns, tags = sorted(source_config.columns.items()), sorted(source_config.tags.items())
    options = [FORMAT, source_config.format, columns, tags, source_config.max_rows]
    options += [config.max_length, tokenizer.chat_template, config.train_on, backend, special]
    digest = xxhash.xxh3_128(repr(options).encode())
    if source_config.format == "text":
        digest.update(f"{config.concatenate}".encode())
    else:
        for option in _changed_options(row_tokenizer):
            digest.update(option.encode())
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def _changed_options(row_tokenizer: RowTokenizer) -> Iterator[str]:
    """The options of conversations that are not at their defaults."""
    config = row_tokenizer.config
    if config.template_arguments:
        yield f"template_arguments={sorted(config.template_arguments.items())}"
    if config.template_date and row_tokenizer.template.writes_date:
        yield f"template_date={config.template_date}"
    if not config.learn_empty_reasoning:
        yield "learn_empty_reasoning=False"


def _file_key(key: str, row_tokenizer: RowTokenizer) -> str:
    """The name of the cached file of rows with this cache key."""
    parts = [key, TOKENIZATION, row_tokenizer.too_long, str(row_tokenizer.embeddings or "")]
    if row_tokenizer.config.row_seconds != DataConfig().row_seconds:  # it decides about bad rows
        parts.append(str(row_tokenizer.config.row_seconds))
    return xxhash.xxh3_128_hexdigest(" ".join(parts).encode())
