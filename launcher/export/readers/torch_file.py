"""A `torch.save` archive, read without executing its pickle and without reading its tensors.

The archive is a zip of `data.pkl`, `byteorder` and one uncompressed entry a storage
(torch.serialization, "zipfile-based"). The pickle is rebuilt by an unpickler that knows the few
classes that checkpoints hold; tensors come back as ranges of bytes of the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from launcher.errors import UserError
from launcher.export.readers.rebuild import Places, find_class, resolved, storage
from launcher.export.tensor import Tensor, held

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the entry's name and extra field
DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
    ImportError, MemoryError, RecursionError, RuntimeError, AssertionError, OverflowError,
)  # fmt: skip


def read_file(path: Path, begin: int = 0, length: int | None = None) -> Any:
    """What was saved, its tensors as `Tensor`s and foreign objects as inert stubs.

    `begin`, `length`: where in the file the archive lies. Raises UserError when it is damaged, cut
    short, compressed, or names anything but data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(begin)
            is_archive = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    end = size if length is None else begin + length
    if end > size:
        raise UserError(f"{path} ends before byte {end}: it was cut short")
    if is_archive:
        return _read_archive(path, begin, end)
    if begin == 0 and length is None:
        return _read_legacy(path)
    raise UserError(f"{path} holds no torch.save archive at byte {begin}")


def _read_archive(path: Path, begin: int, end: int) -> Any:
    with path.open("rb", buffering=0) as file, io.BufferedReader(_Window(file, begin, end)) as part:
        try:
            entries = _entries(path, part, end - begin)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise UserError(f"{path} is no whole torch.save archive: {error}") from error
        if "data.pkl" not in entries:
            raise UserError(f"{path} is a zip archive, but none of torch.save: it has no data.pkl")
        if "byteorder" in entries and _content(part, entries["byteorder"]) != b"little":
            raise UserError(f"{path} was saved on a big-endian machine, which is not supported")
        data = _content(part, entries["data.pkl"])
    places = {
        name.removeprefix("data/"): (begin + at, size)
        for name, (at, size) in entries.items()
        if name.startswith("data/")
    }
    return _load(path, data, places)


def unpickle(path: Path) -> Any:
    """What a bare pickle holds, in the same restricted way. Raises UserError when it is damaged."""
    try:
        return _load(path, path.read_bytes(), {})
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _load(path: Path, data: bytes, places: Places) -> Any:
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.path, unpickler.places = path, places
    try:
        return resolved(unpickler.load())
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _entries(path: Path, part: IO[bytes], size: int) -> Places:
    """Where each entry's bytes are in the archive: name → (begin, length). The name is without its
    first folder, which is that of the file that was saved."""
    places = {}
    for entry in zipfile.ZipFile(part).infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {entry.filename} is compressed; save it with torch.save")
        part.seek(entry.header_offset)
        header = part.read(LOCAL_HEADER.size)
        if len(header) != LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise UserError(f"{path} is damaged: {entry.filename} is not where its index says")
        _, name, extra = LOCAL_HEADER.unpack(header)
        at = entry.header_offset + LOCAL_HEADER.size + name + extra
        if at + entry.file_size > size:
            raise UserError(f"{path} ends inside {entry.filename}: it was cut short")
        places[entry.filename.partition("/")[2]] = at, entry.file_size
    return places


def _content(part: IO[bytes], place: tuple[int, int]) -> bytes:
    """Not by zipfile, which would check a checksum that torch need not have written."""
    part.seek(place[0])
    return part.read(place[1])


def _read_legacy(path: Path) -> Any:
    """A file of torch before 1.6: read whole, by torch's own restricted unpickler."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, OSError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a torch.save file: {first}") from error
    return _hold(content, path)


def _hold(content: Any, path: Path) -> Any:
    if isinstance(content, torch.Tensor):
        return held("", content.detach(), path)
    if isinstance(content, dict):
        return {key: _hold(value, path) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_hold(value, path) for value in content]
    return content


class _Unpickler(pickle.Unpickler):
    path: Path
    places: Places

    def find_class(self, module: str, name: str) -> Any:
        return find_class(self.path, module, name)

    def persistent_load(self, pid: Any) -> Any:
        return storage(self.path, self.places, pid)


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
        left = max(0, self.end - self.begin - self.at)
        data = os.pread(self.file.fileno(), min(len(buffer), left), self.begin + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def tensors_in(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(name → tensor, names of all else) of a state dict. Raises UserError when it is none."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")
    tensors = {str(k): v.called(str(k)) for k, v in content.items() if isinstance(v, Tensor)}
    return tensors, [str(key) for key in content if str(key) not in tensors]
