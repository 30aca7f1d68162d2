"""The tensors of a model folder: by their names in the files, and by those in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from launcher.errors import UserError
from launcher.folders.model import single_weights_file
from launcher.folders.tensor_entries import (
    INDEX,
    TensorEntry,
    check_index,
    file_entries,
    read_weight_map,
)
from launcher.io.conversion import Conversion
from launcher.io.readers.safetensors_file import DTYPES
from launcher.io.weight_views import LazyWeight
from launcher.model.lazy_weight import FileWeight, TensorFile

MB = 1e6
MAX_KINDS = 4  # of tensors, that a log line lists


class SafetensorsFolder(Mapping[str, FileWeight]):
    """The tensors of a model folder by name."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if a file is damaged, if index and files disagree, if there are several
        files and no index, or for a dtype that torch does not have."""
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            self._entries = _indexed_entries(index)
        else:
            self._entries = file_entries(single_weights_file(folder))
        for name, entry in self._entries.items():
            if entry.dtype not in DTYPES:
                raise UserError(f"{entry.file}: {name} has the dtype {entry.dtype}, unknown here")
        self._files = {path: TensorFile(path) for path in self._paths}

    @property
    def bytes_read(self) -> int:
        """Bytes that this process has read; bytes that it read twice count twice."""
        return sum(file.bytes_read for file in self._files.values())

    @property
    def nbytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self._paths)

    def nbytes_of(self, names: set[str]) -> int:
        """Size of the tensors with these `names`."""
        return sum(self._entries[name].end - self._entries[name].begin for name in names)

    def __getitem__(self, name: str) -> FileWeight:
        entry = self._entries[name]
        file, dtype = self._files[entry.file], DTYPES[entry.dtype]
        return FileWeight(file, entry.begin, entry.shape, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def _paths(self) -> set[Path]:
        return {entry.file for entry in self._entries.values()}


def _indexed_entries(index: Path) -> dict[str, TensorEntry]:
    """Name → tensor of the files that `index` lists. Raises UserError."""
    folder, file_of = index.parent, read_weight_map(index)
    files = sorted(set(file_of.values()))
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise UserError(f"{index} lists files that are missing: {', '.join(missing)}")
    entries = {file: file_entries(folder / file) for file in files}
    check_index(index, file_of, entries)
    return {name: entries[file][name] for name, file in file_of.items()}


class ModelTensors:
    """The tensors of a folder by the names that they have in a model, in its shapes."""

    def __init__(self, folder: SafetensorsFolder, model: nn.Module, conversion: Conversion) -> None:
        self._folder = folder
        state = model.state_dict(keep_vars=True)
        found = conversion.sources
        shared = {id(state[name]): source for name, source in found.items()}
        ties = {name: shared[id(value)] for name, value in state.items() if id(value) in shared}
        self._sources = ties | found

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    @property
    def nbytes(self) -> int:
        return self._folder.nbytes

    @property
    def bytes_read(self) -> int:
        return self._folder.bytes_read

    def __getitem__(self, name: str) -> LazyWeight:
        return self._sources[name]


def describe_unused(folder: Path, files: SafetensorsFolder, unused: set[str]) -> str:
    """A log line about tensors that are not read, by what they have in common: model.visual."""
    read = {name[:end] for name in files.keys() - unused for end in _ends_of_parts(name)}
    parts = {
        next((name[:end] for end in _ends_of_parts(name) if name[:end] not in read), name)
        for name in unused
    }
    kinds = sorted({re.sub(r"\.\d+(?=\.)", ".*", part) for part in parts})
    more = f" and {len(kinds) - MAX_KINDS} more" if len(kinds) > MAX_KINDS else ""
    return (
        f"{folder}: not read, because the model does not have them: {', '.join(kinds[:MAX_KINDS])}"
        f"{more} ({len(unused)} tensors, {files.nbytes_of(unused) / MB:,.1f} MB)"
    )


def _ends_of_parts(name: str) -> list[int]:
    """Where the parts of a dotted name end, the first one first."""
    return [*(match.start() for match in re.finditer(r"\.", name)), len(name)]
