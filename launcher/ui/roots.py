"""The folders that the page may read and write. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from launcher.config import Config
from launcher.config.schema.data import HUB
from launcher.data import source
from launcher.errors import UserError
from launcher.folders import paths, regular
from launcher.folders.model import is_hub_id

MAX_CHECKED_FILES = 20_000  # in a folder
MAX_RECORD_BYTES = 16_000_000  # of a settings or status file, which is read at once
NAME_PATTERN = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Roots:
    """The folders that the page may use. Commands run in the first one, which contains `runs/`.

    The page may also read the cache of fetched models and the files of the package.
    """

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, folders: list[Path]) -> Roots:
        """Raises UserError for a root that is not a folder."""
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"--root {folder} is not a folder → create it, or choose another")
        return cls(tuple(folder.resolve() for folder in folders))

    @property
    def home(self) -> Path:
        """The first root."""
        return self.roots[0]

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.home / "runs"

    def to_read(self, path: str | Path) -> Path:
        """`path` with links resolved. Raises UserError if the page may not read it."""
        expanded = _expand(path)
        return expanded if _is_read_only(expanded) else self._resolve(path)

    def to_write(self, path: str | Path) -> Path:
        """`path` with links resolved. Raises UserError if it lies outside the roots."""
        return self._resolve(path)

    def open(self, path: Path, writing: bool = False, append: bool = False) -> BinaryIO:
        """Open a regular file for reading, or create or truncate it to write.

        Raises UserError if it lies outside the roots, also if a link is put there at this moment,
        and for a pipe or a device; OSError if it cannot be opened.
        """
        resolved = self.to_write(path) if writing or append else self.to_read(path).resolve()
        if resolved.exists() and not resolved.is_file():  # opening a device may have an effect
            raise UserError(f"{path} is not a regular file")
        mode = os.O_WRONLY | os.O_CREAT if writing or append else os.O_RDONLY
        mode |= os.O_APPEND if append else os.O_TRUNC if writing else 0
        descriptor = regular.open_descriptor(resolved, mode | os.O_NOFOLLOW)
        try:
            opened = Path(f"/proc/self/fd/{descriptor}")
            if opened.exists() and opened.resolve() != resolved:
                raise UserError(f"{path} has changed while it was opened")
            return os.fdopen(descriptor, "wb" if writing or append else "rb")
        except BaseException:
            os.close(descriptor)
            raise

    def check_record(self, path: Path) -> None:
        """Raises UserError if `path` exists and the page may not read it at once."""
        if not os.path.lexists(path):
            return
        try:
            with self.open(path) as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return  # a link to a file in a root that does not exist
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if size > MAX_RECORD_BYTES:
            raise UserError(
                f"{path} has {size / 1e6:,.0f} MB, too large for a settings or status file"
            )

    def is_readable(self, path: Path) -> bool:
        """Whether `path` is a regular file that the page may read."""
        try:
            self.open(path).close()
        except (OSError, UserError):
            return False
        return True

    def check_tree(self, path: str | Path) -> Path:
        """`path` as `to_read` returns it. Raises UserError if it lies outside the roots, or a file
        in it does through a link, or is a pipe or a device, or if there are too many files.

        For folders that a command will read, which opens more files than the page knows.
        """
        top = self.to_read(path)
        if not _is_read_only(top):
            self._check_entry(top)
            self._check_below(top, path)
        return top

    def _check_below(self, top: Path, name: str | Path) -> None:
        remaining = MAX_CHECKED_FILES
        for folder, folders, names in os.walk(top, followlinks=True):  # as readers do
            remaining -= len(folders) + len(names)
            if remaining < 0:
                raise UserError(
                    f"{name} contains more than {MAX_CHECKED_FILES:,} files → a folder that "
                    "contains only what is needed"
                )
            for entry in (*folders, *names):
                self._check_entry(Path(folder, entry))

    def _check_entry(self, path: Path) -> None:
        if path.is_symlink():
            self.to_read(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is neither a file nor a folder → remove it")

    def run_folder(self, name: str) -> Path:
        """The folder in runs/ with this name; it may not exist. Raises UserError for a bad name."""
        if not all(map(NAME_PATTERN.fullmatch, parts := name.split("/"))) or len(parts) > 2:
            raise UserError(
                f"{name} is not a valid run name → letters, digits, '.', '_', '+' and '-', at most "
                "100 characters, the first one a letter or a digit"
            )
        return self.to_write(self.runs / name)

    def short_path(self, path: Path) -> str:
        """`path` relative to the first root, or unchanged if it is not in it."""
        is_inside = path.is_relative_to(self.home)
        return str(path.relative_to(self.home) if is_inside else path)

    def refusals(self, config: Config) -> Iterator[str]:
        """A message for each path in `config` that the page may not use. Opens no file."""
        for key, path in _paths_in(config):
            try:
                self.to_read(path)
            except UserError as error:
                yield f"{key}={error}"
        if config.strategy.on_disk and (folder := getattr(config.strategy, "nvme_path", None)):
            try:
                self.to_write(folder)
            except UserError as error:
                yield f"strategy.nvme_path={error}"

    def refusals_within(self, config: Config) -> Iterator[str]:
        """The same for the files in a list of data sets, a folder or a glob, in the folder of a
        model, an adapter or a checkpoint, and for their links.

        Reads the list and the names of the files.
        """
        for key, path in _paths_in(config):
            try:
                if not key.startswith("data.") or key in ("data.template", "data.dataset_info"):
                    self.check_tree(path)
            except UserError as error:
                yield f"{key}={error}"
                return
        try:
            for each in source.resolve_sources(config.data).values():
                if each.path and not each.path.startswith(HUB):
                    self._check_files(each.path)
        except UserError as error:
            text = str(error)
            yield text if text.startswith("data.") else f"data.path={text}"

    def _check_files(self, pattern: str) -> None:
        """Raises UserError if a file of a folder or a glob lies outside the roots, or if there are
        too many files."""
        fixed = Path(*takewhile(lambda part: not re.search(r"[*?\[]", part), Path(pattern).parts))
        self.check_tree(pattern if fixed == Path(pattern) else fixed)

    def _resolve(self, path: str | Path) -> Path:
        resolved = (self.home / _expand(path)).resolve()
        if not any(resolved.is_relative_to(root) for root in self.roots):
            raise UserError(
                f"{path} is outside {', '.join(map(str, self.roots))} → another path, or start "
                "shardway ui with one more --root"
            )
        return resolved


def _is_read_only(path: Path) -> bool:
    """Whether `path` is in the cache, the package or the hub's cache, whose snapshots are links.

    The page cannot write to these folders, so links in them can be trusted.
    """
    from huggingface_hub import constants

    folders = (paths.cache(), paths.PACKAGE, Path(constants.HF_HUB_CACHE).absolute())
    return ".." not in path.parts and any(path.is_relative_to(folder) for folder in folders)


def _expand(path: str | Path) -> Path:
    """`path` with `~` expanded. Raises UserError for an invalid path."""
    try:
        expanded = Path(path).expanduser()
        expanded.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a null byte, a loop, an unknown ~user
        raise UserError(f"{str(path)[:200]!r} is not a valid path: {error}") from error
    return expanded


def _paths_in(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every setting of `config` that is a path of a file or folder."""
    data, method = config.data, config.method
    if not is_hub_id(config.model.name_or_path):
        yield "model.name_or_path", config.model.name_or_path
    yield from (
        (key, path)
        for key, path in (
            ("data.path", data.path),
            ("data.eval_path", data.eval_path),
            ("data.dataset_info", data.dataset_info),
            *((f"data.sources.{name}.path", each.path) for name, each in data.sources.items()),
        )
        if path and not path.startswith(HUB)
    )
    if data.template and data.template.endswith(".jinja"):
        yield "data.template", data.template
    if adapter := getattr(method, "adapter", None):
        yield "method.adapter", adapter
    for adapter in getattr(method, "merge_first", []):
        yield "method.merge_first", adapter
    if config.resume not in ("none", "auto"):
        yield "resume", config.resume
