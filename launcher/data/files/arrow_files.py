"""Rows of Parquet and Arrow files. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.files.nulls import remove_nulls
from launcher.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 1024  # rows that are converted to Python objects at a time


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, each with its location."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _batch_rows(path, file.iter_batches(batch_size=CHUNK_ROWS))
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not Parquet: {error}") from error


def read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of an Arrow file or stream, each with its location."""
    return _batch_rows(path, iter(open_record_batches(path)))


def open_record_batches(path: Path) -> list[pa.RecordBatch]:
    """The record batches of an Arrow file or stream (`datasets` writes streams), memory-mapped.

    Raises UserError if `path` is neither.
    """
    from pyarrow import ArrowException, ipc, memory_map

    source = memory_map(str(path))
    try:
        reader = ipc.open_file(source)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (ArrowException, OSError):
        source.seek(0)
    try:
        return list(ipc.open_stream(source))
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not Arrow: {error}") from error


def _batch_rows(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    index = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, CHUNK_ROWS):
            for row in batch.slice(begin, CHUNK_ROWS).to_pylist():
                yield f"{path}[{index}]", remove_nulls(row)
                index += 1
