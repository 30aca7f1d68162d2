"""Files as bytes and text: compressed or not, in any encoding. Imports no torch."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from launcher.config.schema.data import UTF_8
from launcher.errors import UserError

# The start of the small file that Git leaves in place of a large one that was not downloaded.
LFS_POINTER = b"version https://git-lfs.github.com/spec"
TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".txt")  # of files that may be compressed
SAME_FORMAT = {".ndjson": ".jsonl", ".tsv": ".csv"}
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".7z", ".rar")
EXAMPLES = "latin-1, cp1252, utf-16, gb18030"  # of encodings, in messages
BLOCK_BYTES = 1 << 16  # read at a time, of bytes or characters
BOMS = (  # UTF-32 before UTF-16, whose mark it starts with
    ("utf-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    ("utf-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


def _open_zstd(file: Path) -> io.BufferedReader:
    import pyarrow  # its import takes a tenth of a second

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": partial(open, mode="rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def compression_of(file: Path) -> str:
    """The suffix of a compressed file in lower case, otherwise an empty string."""
    suffix = file.suffix.lower()
    return suffix if suffix in OPENERS else ""


def suffix_of(file: Path) -> str:
    """The suffix that names the format, in lower case: `.jsonl` of `rows.ndjson.gz`."""
    return SAME_FORMAT.get(own_suffix(file), own_suffix(file))


def own_suffix(file: Path) -> str:
    """The suffix in lower case, without that of the compression: `.ndjson` of `rows.ndjson.gz`."""
    return (file.with_suffix("") if compression_of(file) else file).suffix.lower()


def is_archive(file: Path) -> bool:
    """Whether `file` contains packed data that cannot be read without unpacking them."""
    is_text = suffix_of(file) in TEXT_SUFFIXES
    return suffix_of(file) in ARCHIVE_SUFFIXES or (bool(compression_of(file)) and not is_text)


def codec_name(encoding: str) -> str:
    """Python's name of `encoding`, the same for all its spellings. UTF-8 is `utf-8-sig`, which
    accepts a byte order mark. Raises UserError for an unknown encoding."""
    try:
        "a".encode(encoding)  # refuses codecs that do not encode text, such as base64
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise UserError(
            f"data.encoding={encoding} is not an encoding that Python knows → data.encoding=NAME, "
            f"for example {UTF_8}, {EXAMPLES}"
        ) from error
    return "utf-8-sig" if name == UTF_8 else name


def is_utf_8(encoding: str) -> bool:
    """Whether `encoding` is UTF-8, in any spelling. Raises UserError for an unknown encoding."""
    return codec_name(encoding) == "utf-8-sig"


def open_bytes(file: Path) -> BinaryIO:
    """The content of `file`, decompressed."""
    return cast(BinaryIO, OPENERS[compression_of(file)](file))


def open_text(file: Path, encoding: str, newline: str | None = None) -> TextIO:
    """The text of `file`, without a byte order mark. `newline` is that of `open`."""
    opened = open_bytes(file)
    return io.TextIOWrapper(opened, _codec(opened, encoding), newline=newline)


def _codec(opened: BinaryIO, encoding: str) -> str:
    """The codec that decodes the file, including its byte order mark: utf-16-le keeps the mark."""
    codec = codec_name(encoding)
    for name, marks in BOMS:
        if codec.startswith(name) and _peek(opened).startswith(marks):
            return name
    return codec


def _peek(opened: BinaryIO) -> bytes:
    return cast(io.BufferedReader, opened).peek(len(codecs.BOM_UTF32_LE))


@contextmanager
def reading(file: Path, encoding: str = UTF_8) -> Iterator[None]:
    """Turns what reading `file` raises into a UserError that names it."""
    try:
        yield
    except UnicodeError as error:
        name = "UTF-8" if is_utf_8(encoding) else f"data.encoding={encoding}"
        raise UserError(
            f"data.path={file} is not {name} ({error}) → convert it, or data.encoding=NAME, for "
            f"example {EXAMPLES}"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"data.path={file} is damaged: {error}; download or compress it again"
        ) from error
    except OSError as error:
        raise UserError(f"data.path={file} cannot be read: {error.strerror or error}") from error


def check(file: Path, encoding: str, expected: str) -> None:
    """Raises UserError if the first bytes show that `file` cannot be read: it is empty, in another
    encoding, or a Git LFS pointer. `expected` is what the file should contain."""
    expects_utf_8 = is_utf_8(encoding)
    with reading(file, encoding):
        with file.open("rb") as raw:
            if raw.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"data.path={file} is a Git LFS pointer, not the data → git lfs pull"
                )
        is_text = suffix_of(file) in TEXT_SUFFIXES
        with open_bytes(file) as opened:
            if is_text and expects_utf_8:
                _check_utf_8(file, opened)
            if _is_blank(opened, is_text):
                raise UserError(
                    f"data.path={file} is empty: it contains no {expected}, or remove the file"
                )


def _check_utf_8(file: Path, opened: BinaryIO) -> None:
    start = _peek(opened)[: len(codecs.BOM_UTF32_LE)]
    found = json.detect_encoding(start)  # UTF-16 and UTF-32, also without a byte order mark
    if not found.startswith(UTF_8):
        raise UserError(
            f"data.path={file} is not UTF-8 but {found.upper()} → data.encoding={found}"
        )


def _is_blank(opened: BinaryIO, is_text: bool) -> bool:
    while block := opened.read(BLOCK_BYTES):
        if not is_text or block.removeprefix(codecs.BOM_UTF8).strip():
            return False
    return True
