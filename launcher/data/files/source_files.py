"""The files of a source, and what is known without reading their rows. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.config.schema.data import HUB, SourceConfig
from launcher.data.files import file_rows, splits, text_files
from launcher.errors import UserError

LINE_SUFFIXES = (".jsonl", ".txt")  # of files with a row per line
NAMED_FILES = 3  # in a note


def encoding_content(source: SourceConfig) -> list[bytes]:
    """What `iter_content` says about the encoding: nothing for UTF-8."""
    if text_files.is_utf_8(source.encoding):
        return []
    return [f"encoding {text_files.codec_name(source.encoding)}".encode()]


def find_files(source: SourceConfig) -> list[Path]:
    """The files of `source`: in a folder that has splits, those of data.split.

    Raises UserError if there are none, or if data.split or data.subset select nothing.
    """
    path = source.path or ""
    files = file_rows.find(path, source.format == "text")
    if Path(path).is_dir():
        return splits.choose(Path(path), files, source.split, source.subset)
    chosen = {"data.split": source.split, "data.subset": source.subset}
    without_effect = {"data.split": (splits.TRAIN, splits.FOR_EVALUATION), "data.subset": (None,)}
    for key, value in chosen.items():
        if value not in without_effect[key]:
            raise UserError(
                f"{key}={value} chooses from a folder or a hub data set, and data.path={path} "
                f"names files → remove {key}"
            )
    return files


def describe_left_out(source: SourceConfig) -> Iterator[str]:
    """Notes on the files in the folder of `source` that are not read. Nothing for a file, a glob
    or a hub data set."""
    folder, text = Path(source.path or ""), source.format == "text"
    if not source.path or not folder.is_dir():
        return
    readable, others = file_rows.list_folder(folder, text)
    read = set(splits.choose(folder, readable, source.split, source.subset))
    if not_read := [file for file in readable if file not in read]:
        of_split = "the evaluation" if source.split == splits.FOR_EVALUATION else source.split
        yield (
            f"{folder}: {len(read)} file(s) of {of_split} are read, {_count(folder, not_read)} of "
            "other splits, or of none, are not"
        )
    if others:
        yield f"{folder}: {_count(folder, others)} of other types are not read"


def _count(folder: Path, files: list[Path]) -> str:
    names = ", ".join(str(file.relative_to(folder)) for file in files[:NAMED_FILES])
    return f"{len(files)} file(s) ({names}{', …' if len(files) > NAMED_FILES else ''})"


def check_streaming(source: SourceConfig) -> None:
    """Raises UserError if the rows of `source` cannot be read by number."""
    path = source.path or ""
    if path.startswith(HUB):
        raise UserError(
            f"data.streaming=true reads files, and data.path={path} is downloaded completely → "
            "data.streaming=false"
        )
    for file in find_files(source):
        is_packed = bool(text_files.compression_of(file))
        if is_packed or text_files.suffix_of(file) not in (*LINE_SUFFIXES, ".arrow"):
            raise UserError(
                f"data.streaming=true: the rows of {file} cannot be read by number; "
                + ("unpack it" if is_packed else "convert it to .jsonl or .arrow")
                + " → data.streaming=false"
            )
        # utf-8-sig puts a mark at the start, and a line feed alone is still one byte.
        line_feeds = "\n\n".encode(source.encoding)
        if text_files.suffix_of(file) in LINE_SUFFIXES and not line_feeds.endswith(b"\n\n"):
            raise UserError(
                f"data.streaming=true finds no lines in data.encoding={source.encoding}; convert "
                f"{file} to UTF-8 → data.streaming=false"
            )
