"""Tokenised rows, made once and kept by content.

A source has two files in the cache: Arrow record batches of its rows' ids and masks, which are
memory-mapped (ranks of one machine share the pages, and no rank holds them all), and a summary in
JSON, written last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher import paths
from launcher.config.data import DataConfig
from launcher.data import source
from launcher.data.tokenise import Batch, Tokeniser, batches
from launcher.errors import UserError

FORMAT = "3"  # part of the key: raise it when tokenising changes
SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.uint8()))])
SHOWN_BAD = 20  # sentences kept of rows that were skipped

Row = tuple[NDArray[np.int32], NDArray[np.bool_]]  # ids [n], trained [n]
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Summary:
    """What became of the rows of a source."""

    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    dropped: int = 0  # nothing to learn was left of them within max_length
    truncated: int = 0  # cut at max_length
    skipped: int = 0  # could not be read
    bad: tuple[str, ...] = ()  # why, of the first of these
    nbytes: int = 0  # of the file of record batches

    def plus(self, batch: Batch) -> Summary:
        return Summary(
            self.rows + len(batch.lengths),
            self.tokens + len(batch.ids),
            self.learnt + int(batch.trained.sum()),
            self.dropped + batch.dropped,
            self.truncated + batch.truncated,
            self.skipped + len(batch.bad),
            (*self.bad, *batch.bad)[:SHOWN_BAD],
        )

    @classmethod
    def read(cls, store: Path) -> Summary | None:
        """That of a store that is whole, or None."""
        try:
            found = json.loads(store.with_suffix(".json").read_text(encoding="utf-8"))
            summary = cls(**{**found, "bad": tuple(found["bad"])})
            return summary if store.stat().st_size == summary.nbytes else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def describe(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.learnt:,} of them learnt"
        if self.truncated:
            text += f"; {self.truncated:,} rows cut at data.max_length"
        if self.dropped:
            text += f"; {self.dropped:,} rows left out: no answer within data.max_length"
        if self.skipped:
            text += f"; {self.skipped:,} bad rows skipped, the first: {self.bad[0]}"
        return text


class Rows:
    """Rows of token ids in memory-mapped chunks: `len`, `lengths`, and `rows[i]`."""

    def __init__(self, stores: Sequence[Path]) -> None:
        self._chunks: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]] = []
        for store in stores:
            reader = pa.ipc.open_file(pa.memory_map(str(store)))
            for number in range(reader.num_record_batches):
                ids, trained = reader.get_batch(number).columns
                values = trained.values.to_numpy().view(np.bool_)
                self._chunks.append((ids.offsets.to_numpy(), ids.values.to_numpy(), values))
        lengths = [np.diff(offsets) for offsets, _, _ in self._chunks]
        self._begins = np.cumsum([0, *map(len, lengths)])  # the row that each chunk begins with
        self.lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int32)  # [rows]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Row:
        chunk = int(np.searchsorted(self._begins, row, side="right")) - 1
        offsets, ids, trained = self._chunks[chunk]
        at = row - self._begins[chunk]
        begin, end = offsets[at], offsets[at + 1]
        return ids[begin:end], trained[begin:end]

    def length(self, row: int) -> int:
        return int(self.lengths[row])


@dataclass(frozen=True)
class DataSet:
    """The rows of all sources, one source behind the other."""

    rows: Rows
    summaries: dict[str, Summary]  # by the name of the source
    fingerprint: str  # of the content of files, tokenizer and options

    @property
    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [summary.rows for summary in self.summaries.values()]

    def describe(self) -> str:
        if len(self.summaries) == 1:
            return next(iter(self.summaries.values())).describe()
        each = (f"{name}: {summary.describe()}" for name, summary in self.summaries.items())
        return "\n      ".join([f"{len(self.rows):,} rows of {len(self.sizes)} sources", *each])


def load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, on_rows: OnRows = lambda done: None
) -> DataSet:
    """Tokenise what `config` names, or take it from the cache where the same was tokenised before.

    The key is the content of file, tokenizer and template and the options, so a changed file is
    noticed. One process tokenises (and its workers); others on the machine wait for its lock.
    `on_rows` is called with the rows read so far; what it raises ends the work and nothing is
    kept. Raises UserError for data of which nothing can be learnt.
    """
    stores, summaries, keys = [], {}, []
    for name, each in source.sources_of(config).items():
        tokeniser = Tokeniser(each, config, tokenizer)
        keys.append(key(tokeniser, source.content(each)))
        store = paths.cache() / "tokens" / f"{keys[-1]}.arrow"
        summaries[name] = _stored(store, tokeniser, on_rows)
        stores.append(store)
    rows = Rows(stores)
    for name, summary in summaries.items():
        if not summary.rows:
            named = f"data.path={config.path}" if len(summaries) == 1 else f"data source {name}"
            raise UserError(
                f"{named}: every row is bad, the first: {summary.bad[0]}"
                if summary.bad and not summary.dropped
                else f"{named}: no answer lies within data.max_length={config.max_length}; raise it"
            )
    fingerprint = keys[0] if len(keys) == 1 else xxhash.xxh3_128_hexdigest("".join(keys).encode())
    return DataSet(rows, summaries, fingerprint)


def load_evaluation(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, on_rows: OnRows = lambda done: None
) -> DataSet:
    """The rows of `data.eval_path`."""
    return load_data(source.evaluation_of(config), tokenizer, on_rows)


def _stored(store: Path, tokeniser: Tokeniser, on_rows: OnRows) -> Summary:
    """What is in the store, which is made where it is not whole."""
    try:
        summary = Summary.read(store)
        if summary is None:
            store.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(store.with_suffix(".lock")):
                # Another rank may have made it meanwhile.
                summary = Summary.read(store) or _make(store, tokeniser, on_rows)
    except OSError as error:
        raise unwritable(store.parent, error) from error
    if summary.skipped and tokeniser.config.on_bad_row == "fail":
        raise UserError(summary.bad[0])
    return summary


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the token cache {folder} cannot be written: {error.strerror or error}; make room there, "
        "or set SHARDWAY_CACHE to a folder of yours"
    )


def _make(store: Path, tokeniser: Tokeniser, on_rows: OnRows) -> Summary:
    aside, told = store.with_suffix(".partial"), store.with_suffix(".told")
    try:
        summary = Summary()
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in batches(tokeniser, tokeniser.config.workers, on_rows):
                summary = summary.plus(batch)
                if len(batch.lengths):
                    writer.write_batch(_record_batch(batch))
        summary = replace(summary, nbytes=aside.stat().st_size)
        told.write_text(json.dumps(asdict(summary)), encoding="utf-8")
        aside.replace(store)
        told.replace(store.with_suffix(".json"))
    finally:  # nothing half done stays, least of all on a disk that is full
        aside.unlink(missing_ok=True)
        told.unlink(missing_ok=True)
    return summary


def _record_batch(batch: Batch) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32))
    values = (pa.array(batch.ids), pa.array(batch.trained.view(np.uint8)))
    columns = [pa.ListArray.from_arrays(offsets, each) for each in values]
    return pa.record_batch(columns, schema=SCHEMA)


def key(tokeniser: Tokeniser, content: Iterable[bytes]) -> str:
    """Of everything that rows depend on: of the files their `content`."""
    config, each, tokenizer = tokeniser.config, tokeniser.source, tokeniser.tokenizer
    backend = repr(tokenizer)
    if tokenizer.is_fast:  # how it last cut and padded is no part of it
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        backend = json.dumps({**parts, "truncation": None, "padding": None})
    special = sorted(tokenizer.special_tokens_map.items())  # templates and the mask use them
    columns, tags = sorted(each.columns.items()), sorted(each.tags.items())
    options = [FORMAT, each.format, columns, tags, each.max_rows, config.max_length]
    options += [tokenizer.chat_template, config.train_on, backend, special]
    digest = xxhash.xxh3_128(repr(options).encode())
    if each.format == "text":
        digest.update(f"{config.concatenate}".encode())
    for part in content:
        digest.update(part)
    return digest.hexdigest()
