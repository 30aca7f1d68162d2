"""All rows of a source to arrays of token ids, on all available cores."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from launcher.data import source
from launcher.data.files.file_rows import RawRow
from launcher.data.tokenize import RowTokenizer, TokenBatch
from launcher.io.cpus import usable_cpus

CHUNK_ROWS = 512  # tokenized in one call and written as one record batch
CHUNK_CHARACTERS = 1 << 20  # of raw text
# Below this number of rows, one process is done before worker processes have started.
SINGLE_PROCESS_ROWS = 20_000
MAX_WORKERS = 32


def tokenize_source(
    row_tokenizer: RowTokenizer, workers: int | None, on_progress: Callable[[int], None]
) -> Iterator[TokenBatch]:
    """All rows of the source, in order.

    `workers` is the number of processes; None: one for a small source, otherwise one per core.
    `on_progress` receives the number of rows read so far; if it raises, the work stops.
    """
    rows = source.iter_rows(row_tokenizer.source, by_line=not row_tokenizer.config.concatenate)
    batches = _tokenize_rows(row_tokenizer, rows, workers, on_progress)
    return _concatenate(batches, row_tokenizer) if row_tokenizer.concatenates else batches


def _tokenize_rows(
    row_tokenizer: RowTokenizer,
    rows: Iterator[RawRow],
    workers: int | None,
    on_progress: Callable[[int], None],
) -> Iterator[TokenBatch]:
    done = 0

    def chunks(max_rows: int | None = None) -> Iterator[list[RawRow]]:
        nonlocal done
        while chunk := _next_chunk(rows):
            on_progress(done)
            yield chunk
            done += len(chunk)
            if max_rows is not None and done >= max_rows:
                return

    if workers is None:
        yield from map(row_tokenizer, chunks(SINGLE_PROCESS_ROWS))
        workers = min(usable_cpus(), MAX_WORKERS)
    yield from (
        map(row_tokenizer, chunks())
        if workers == 1
        else _tokenize_in_pool(row_tokenizer, chunks(), workers)
    )


def _next_chunk(rows: Iterator[RawRow]) -> list[RawRow]:
    """The next CHUNK_ROWS rows, or fewer if they are long texts."""
    chunk, characters = [], 0
    for raw_row in islice(rows, CHUNK_ROWS):
        chunk.append(raw_row)
        row = raw_row[1]
        characters += len(row.text) if isinstance(row, source.TextPart) else 0
        if characters > CHUNK_CHARACTERS:
            break
    return chunk


def _tokenize_in_pool(
    row_tokenizer: RowTokenizer, chunks: Iterator[list[RawRow]], workers: int
) -> Iterator[TokenBatch]:
    """The batches in order. Only as many chunks are in memory as keep the workers busy."""
    first = next(chunks, None)
    if first is None:
        return
    spawn = multiprocessing.get_context("spawn")  # this process has threads: no fork
    with ProcessPoolExecutor(workers, spawn, _init_worker, (row_tokenizer,)) as pool:
        pending: deque[Future[TokenBatch]] = deque([pool.submit(_tokenize_in_worker, first)])
        try:
            for chunk in chunks:
                pending.append(pool.submit(_tokenize_in_worker, chunk))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker_tokenizer: RowTokenizer | None = None  # set in a worker process


def _init_worker(row_tokenizer: RowTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = row_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core already has a process
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:  # a parent that is killed cannot shut its workers down
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _tokenize_in_worker(rows: list[RawRow]) -> TokenBatch:
    assert _worker_tokenizer is not None
    return _worker_tokenizer(rows)


def _concatenate(
    batches: Iterator[TokenBatch], row_tokenizer: RowTokenizer
) -> Iterator[TokenBatch]:
    """All texts as one sequence, cut into rows of max_length; the last row may be shorter."""
    length = row_tokenizer.config.max_length
    rest = np.empty(0, np.int32)
    for batch in batches:
        rest = np.concatenate([rest, batch.ids])
        full_rows = len(rest) // length
        text = _text_batch(rest[: full_rows * length], [length] * full_rows)
        yield replace(text, errors=batch.errors, notes=batch.notes)
        rest = rest[full_rows * length :]
    if len(rest) > 1:
        yield _text_batch(rest, [len(rest)])


def _text_batch(ids: NDArray[np.int32], lengths: list[int]) -> TokenBatch:
    """A batch with all tokens in the loss."""
    return TokenBatch(ids.copy(), np.ones(len(ids), np.bool_), np.asarray(lengths, np.int32))
