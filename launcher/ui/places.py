"""Which folders the page may read and write. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from launcher import paths
from launcher.config import Config
from launcher.config.data import HUB
from launcher.config.model_rules import is_hub_id
from launcher.data import source
from launcher.errors import UserError

LOOKED_AT_FILES = 20_000  # in a folder of data
NAME = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Places:
    """The roots, the first of which is where commands run and `runs/` is. The cache of fetched
    models and what ships with Shardway may be read, too."""

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, folders: list[Path]) -> Places:
        """Raises UserError for a root that is no folder."""
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"--root {folder} is no folder → make it, or name another")
        return cls(tuple(folder.resolve() for folder in folders))

    @property
    def home(self) -> Path:
        return self.roots[0]

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    def to_read(self, path: str | Path) -> Path:
        """`path`, in the roots without links. Raises UserError where it leads out of what may be
        read."""
        named = _plain(path)
        ours = (paths.cache(), paths.PACKAGE)  # which the page cannot write: links there are good
        if ".." not in named.parts and any(named.is_relative_to(folder) for folder in ours):
            return named
        return self._within(path, self.roots)

    def to_write(self, path: str | Path) -> Path:
        """`path` without links. Raises UserError where it leads out of the roots."""
        return self._within(path, self.roots)

    def run(self, name: str) -> Path:
        """The folder in runs/ of that name, there or not. Raises UserError for what is no name."""
        if not all(map(NAME.fullmatch, parts := name.split("/"))) or len(parts) > 2:
            raise UserError(
                f"{name} is no name of a run → letters, digits, '.', '_', '+' and '-', at most "
                "100, the first a letter or a digit"
            )
        return self.to_write(self.runs / name)

    def typed(self, path: Path) -> str:
        """`path` as one would type it in the first root."""
        inside = path.is_relative_to(self.home)
        return str(path.relative_to(self.home) if inside else path)

    def refusals(self, config: Config) -> Iterator[str]:
        """A sentence for each path of `config` that leads out, before any of them is opened."""
        for key, path in _named(config):
            try:
                self.to_read(path)
            except UserError as error:
                yield f"{key}={error}"
        if config.strategy.on_disk and (where := getattr(config.strategy, "nvme_path", None)):
            try:
                self.to_write(where)
            except UserError as error:
                yield f"strategy.nvme_path={error}"

    def refusals_within(self, config: Config) -> Iterator[str]:
        """The same for what stands in a list of data sets, a folder or a pattern: every link in it
        is followed no further than the roots. Reads the list, and names of files."""
        try:
            for each in source.sources_of(config.data).values():
                if each.path and not each.path.startswith(HUB):
                    self._look_through(each.path)
        except UserError as error:
            text = str(error)
            yield text if text.startswith("data.") else f"data.path={text}"

    def _look_through(self, pattern: str) -> None:
        """Raises UserError where a path in `pattern`, a folder or a glob of files, leads out, and
        where there are more than a person would learn from."""
        fixed = Path(*takewhile(lambda part: not re.search(r"[*?\[]", part), Path(pattern).parts))
        self.to_read(pattern if fixed == Path(pattern) else fixed)
        left = LOOKED_AT_FILES
        for folder, folders, names in os.walk(fixed, followlinks=True):  # as it is read
            left -= len(folders) + len(names)
            if left < 0:
                raise UserError(
                    f"{pattern} holds more than {LOOKED_AT_FILES:,} files → a folder of data alone"
                )
            for name in (*folders, *names):
                if (link := Path(folder, name)).is_symlink():
                    self.to_read(link)

    def _within(self, path: str | Path, allowed: tuple[Path, ...]) -> Path:
        found = (self.home / _plain(path)).resolve()
        if not any(found.is_relative_to(root) for root in allowed):
            raise UserError(
                f"{path} is outside {', '.join(map(str, self.roots))} → another path, or start "
                "shardway ui with one more --root"
            )
        return found


def _plain(path: str | Path) -> Path:
    """With `~` spelt out. Raises UserError for what is no path."""
    try:
        named = Path(path).expanduser()
        named.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a null byte, a loop, no such ~user
        raise UserError(f"{str(path)[:200]!r} is no path: {error}") from error
    return named


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """(setting, path) of every file and folder that `config` names."""
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
