"""Stored rows to arrays of token ids, on as many cores as there are."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.config.data import DataConfig, SourceConfig
from launcher.data import source
from launcher.data.chat import Tokens, pieces, tokenize
from launcher.data.text import tokenize_texts
from launcher.errors import UserError

ROWS_AT_ONCE = 512  # tokenised in one call, and written as one batch
CHARACTERS_AT_ONCE = 1 << 20  # of raw text
SMALL_ROWS = 20_000  # so many are tokenised sooner than processes start
MOST_WORKERS = 32

Stored = tuple[str, Any]  # place, row as it is stored


@dataclass
class Batch:
    """Rows of token ids, end to end, and what became of the rows that are not there."""

    ids: NDArray[np.int32]  # [total]
    trained: NDArray[np.bool_]  # [total]
    lengths: NDArray[np.int32]  # [rows]
    dropped: int = 0  # nothing to learn was left within max_length
    truncated: int = 0  # cut at max_length
    bad: list[str] = field(default_factory=list)  # why a row cannot be read


@dataclass(frozen=True)
class Tokeniser:
    """Turns stored rows of one source into a batch."""

    source: SourceConfig
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[Stored]) -> Batch:
        """Raises UserError for the first bad row unless they are to be skipped."""
        found, bad = self._read(rows)
        return batch_of(found, bad, self.joins)

    @property
    def joins(self) -> bool:
        """Whether texts stand end to end, which the batches then do not show yet."""
        return self.source.format == "text" and self.config.concatenate

    def _read(self, rows: list[Stored]) -> tuple[list[Tokens], list[str]]:
        texts: list[source.TextPart] = []
        talks: list[list[tuple[str, bool]]] = []
        bad: list[str] = []
        for place, row in rows:
            try:
                read = source.read_row(self.source, place, row)
                if isinstance(read, source.TextPart):
                    texts.append(read)
                else:
                    talks += pieces(self.tokenizer, read, self.config.train_on, place)
            except UserError as error:
                if self.config.on_bad_row == "fail":
                    raise
                bad.append(str(error))
        length = None if self.joins else self.config.max_length
        if self.source.format == "text":
            return list(tokenize_texts(self.tokenizer, texts, length)), bad
        return list(tokenize(self.tokenizer, talks, self.config.max_length)), bad


def batch_of(rows: list[Tokens], bad: list[str], joined: bool) -> Batch:
    """Those of `rows` that can be learnt from; of texts that will be `joined` all."""
    # Of a row, the first token is never predicted.
    kept = rows if joined else [row for row in rows if any(row.trained[1:])]
    ids = [i for row in kept for i in row.ids]
    trained = [t for row in kept for t in row.trained]
    return Batch(
        np.asarray(ids, np.int32),
        np.asarray(trained, np.bool_),
        np.asarray([len(row.ids) for row in kept], np.int32),
        dropped=len(rows) - len(kept),
        truncated=sum(row.cut for row in rows),
        bad=bad,
    )


def batches(
    tokeniser: Tokeniser, workers: int | None, on_rows: Callable[[int], None]
) -> Iterator[Batch]:
    """Every row of the source, in order. `on_rows` is called with the number of rows read so far;
    what it raises ends the work."""
    rows = source.rows_of(tokeniser.source, by_line=not tokeniser.config.concatenate)
    made = _tokenised(tokeniser, rows, workers, on_rows)
    return _joined(made, tokeniser) if tokeniser.joins else made


def _tokenised(
    tokeniser: Tokeniser,
    rows: Iterator[Stored],
    workers: int | None,
    on_rows: Callable[[int], None],
) -> Iterator[Batch]:
    done = 0

    def chunks(most: int | None = None) -> Iterator[list[Stored]]:
        nonlocal done
        while chunk := _chunk(rows):
            on_rows(done)
            yield chunk
            done += len(chunk)
            if most is not None and done >= most:
                return

    if workers is None:
        yield from map(tokeniser, chunks(SMALL_ROWS))
        workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    yield from map(tokeniser, chunks()) if workers == 1 else _pooled(tokeniser, chunks(), workers)


def _chunk(rows: Iterator[Stored]) -> list[Stored]:
    """The next rows, fewer where they are long texts."""
    chunk, characters = [], 0
    for stored in islice(rows, ROWS_AT_ONCE):
        chunk.append(stored)
        characters += len(stored[1].text) if isinstance(stored[1], source.TextPart) else 0
        if characters > CHARACTERS_AT_ONCE:
            break
    return chunk


def _pooled(tokeniser: Tokeniser, chunks: Iterator[list[Stored]], workers: int) -> Iterator[Batch]:
    """In order, with no more chunks in memory than keep the workers busy."""
    first = next(chunks, None)
    if first is None:
        return
    spawned = multiprocessing.get_context("spawn")  # this process has threads: no fork
    with ProcessPoolExecutor(workers, spawned, _begin, (tokeniser,)) as pool:
        waiting: deque[Future[Batch]] = deque([pool.submit(_work, first)])
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_tokeniser: Tokeniser | None = None  # of a worker process


def _begin(tokeniser: Tokeniser) -> None:
    global _tokeniser
    _tokeniser = tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores have a process each
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:  # a parent that is killed tells nobody
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _work(rows: list[Stored]) -> Batch:
    assert _tokeniser is not None
    return _tokeniser(rows)


def _joined(texts: Iterator[Batch], tokeniser: Tokeniser) -> Iterator[Batch]:
    """Texts end to end, cut into rows of max_length; the last one may be short."""
    length = tokeniser.config.max_length
    waiting = np.empty(0, np.int32)
    for batch in texts:
        waiting = np.concatenate([waiting, batch.ids])
        full = len(waiting) // length
        yield _rows(waiting[: full * length], [length] * full, batch.bad)
        waiting = waiting[full * length :]
    if len(waiting) > 1:
        yield _rows(waiting, [len(waiting)], [])


def _rows(ids: NDArray[np.int32], lengths: list[int], bad: list[str]) -> Batch:
    lasting = np.asarray(lengths, np.int32)
    return Batch(ids.copy(), np.ones(len(ids), np.bool_), lasting, bad=bad)
