"""Reads a `torch.save` file without executing its pickle and without reading its tensors.

The file is a zip archive of `data.pkl`, `byteorder` and one uncompressed entry for each storage
(torch.serialization, "zipfile-based"). An unpickler that knows only the few classes that
checkpoints contain rebuilds the pickle. Tensors become byte ranges of the file.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.unreadable import reason_unreadable
from launcher.io.readers.legacy_torch_file import read_legacy
from launcher.io.readers.unpickle import STATE_DICT, ByteRange, ByteRanges, Inert
from launcher.io.readers.unpickler import DAMAGED, load
from launcher.io.tensor import Tensor

SCRIPT = "code/__torch__"  # how the names of the programs in an archive of torch.jit.save begin
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the entry's name and extra field


def read_file(path: Path, begin: int = 0, length: int | None = None) -> Any:
    """The saved object, with `Tensor`s for tensors and `Inert` objects for unneeded classes.

    `begin`, `length`: the part of the file that contains the archive. Raises UserError if the
    archive is damaged, truncated or compressed, or if its pickle names a class that checkpoints do
    not need.
    """
    try:
        size = path.stat().st_size
        with regular.open_file(path) as file:
            file.seek(begin)
            is_archive = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"{path} {reason_unreadable(path, error)}") from error
    end = size if length is None else begin + length
    if end > size:
        raise UserError(f"{path} ends before byte {end}: it is truncated")
    if is_archive:
        return _read_archive(path, begin, end)
    if reason := reason_unreadable(path):
        raise UserError(f"{path} {reason}")
    if begin == 0 and length is None:
        return read_legacy(path)
    raise UserError(f"{path} contains no torch.save archive at byte {begin}")


def _read_archive(path: Path, begin: int, end: int) -> Any:
    with path.open("rb", buffering=0) as file, io.BufferedReader(_Window(file, begin, end)) as part:
        try:
            entries = _entries(path, part, end - begin)
        except UserError:
            raise
        except (zipfile.BadZipFile, OSError, *DAMAGED) as error:
            raise UserError(f"{path} is not a complete torch.save archive: {error}") from error
        if "data.pkl" not in entries:
            raise UserError(
                f"{path} is a zip archive, but not of torch.save: it has no data.pkl → "
                f"{STATE_DICT} writes one"
            )
        if "byteorder" in entries and _content(part, entries["byteorder"]) != b"little":
            raise UserError(f"{path} was saved on a big-endian machine, which is not supported")
        data = _content(part, entries["data.pkl"])
    storages = {
        name.removeprefix("data/"): (begin + at, size)
        for name, (at, size) in entries.items()
        if name.startswith("data/")
    }
    return load(path, data, storages)


def unpickle(path: Path) -> Any:
    """The content of a bare pickle, with the same restrictions. Raises UserError if it is
    damaged."""
    try:
        with regular.open_file(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return load(path, data, {})


def _entries(path: Path, part: IO[bytes], size: int) -> ByteRanges:
    """The bytes of each entry in the archive. Names are without their first folder, which has the
    name of the saved file."""
    ranges = {}
    for entry in zipfile.ZipFile(part).infolist():
        if entry.filename.partition("/")[2].startswith(SCRIPT):
            raise UserError(
                f"{path} is a program of TorchScript and not a state dict → {STATE_DICT} writes one"
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {entry.filename} is compressed; save it with torch.save")
        part.seek(entry.header_offset)
        header = part.read(LOCAL_HEADER.size)
        if len(header) != LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise UserError(f"{path} is damaged: {entry.filename} is not where the index lists it")
        _, name, extra = LOCAL_HEADER.unpack(header)
        at = entry.header_offset + LOCAL_HEADER.size + name + extra
        if at + entry.file_size > size:
            raise UserError(f"{path} ends inside {entry.filename}: it is truncated")
        ranges[entry.filename.partition("/")[2]] = at, entry.file_size
    return ranges


def _content(part: IO[bytes], byte_range: ByteRange) -> bytes:
    """Does not use zipfile, which would verify a checksum that torch does not have to write."""
    part.seek(byte_range[0])
    return part.read(byte_range[1])


class _Window(io.RawIOBase):
    """Bytes [begin, end) of a file, as a file."""

    def __init__(self, file: io.FileIO, begin: int, end: int) -> None:
        self.file, self.begin, self.end, self.at = file, begin, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.end - self.begin}[whence]
        if origin + offset < 0:
            raise OSError("a position before the archive")
        self.at = origin + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        remaining = max(0, self.end - self.begin - self.at)
        data = os.pread(self.file.fileno(), min(len(buffer), remaining), self.begin + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def tensors_in(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(name → tensor, names of the other entries) of a state dict.

    Raises UserError if `content` is not a dict. `path`: the file, for the message.
    """
    if not isinstance(content, dict):
        raise not_a_state_dict(content, path)
    tensors = {str(k): v.renamed(str(k)) for k, v in content.items() if isinstance(v, Tensor)}
    return tensors, [str(key) for key in content if str(key) not in tensors]


def not_a_state_dict(content: Any, path: Path) -> UserError:
    """The error for a torch file with something else than tensors by name."""
    names = {Tensor: "a single tensor", Inert: "an object", dict: "no tensors by name"}
    found = next((name for kind, name in names.items() if isinstance(content, kind)), None)
    return UserError(
        f"{path} contains {found or f'a {type(content).__name__}'} instead of a state dict → "
        f"{STATE_DICT} writes one"
    )
