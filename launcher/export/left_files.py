"""Which files of SOURCE and the base are not in the export, and why: whatever is no weight that was
read travels, or is listed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path

from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.copied_files import find_copied_files
from launcher.export.source import Source
from launcher.export.source_folders import model_home, template_folder, tokenizer_folder
from launcher.folders.adapter import SETTINGS, WEIGHTS
from launcher.folders.extended_model import RECORD as NEW_TOKENS
from launcher.folders.file_names import SHARDS, matches
from launcher.folders.kind import SHARDED, Kind
from launcher.folders.model import CONFIG
from launcher.folders.model_files import EXPORT_MANIFEST, files_of, is_describing
from launcher.io.readers.model_folder import weights_files
from launcher.io.tokenizer_files import SETTINGS as TOKENIZER
from launcher.io.tokenizer_files import TEMPLATE, is_of_tokenizer

LISTED = 5  # names in a message
ALWAYS_NEW = (EXPORT_MANIFEST, NEW_TOKENS)


def describe_left(source: Source, options: Options, read: Set[Path]) -> tuple[str, ...]:
    """A note for each folder with files that are not in the export, and why. `read`: files with
    weights that are in the export."""
    copied = find_copied_files(source, options)
    notes = []
    for folder in _folders(source, options):
        used = read | _settings_and_weights(source, options, folder)
        left = {
            name: reason
            for name, reason in _reasons(source, options, folder, copied)
            if not _is_used(
                folder / name, used, is_sharded=folder == source.path and source.kind in SHARDED
            )
        }
        if left:
            notes.append(f"not copied from {folder}: {_by_reason(left)}")
    return tuple(notes)


def _folders(source: Source, options: Options) -> list[Path]:
    """SOURCE, its adapters, the folders above it and the base. A checkpoint of Shardway contains
    nothing else than what it is exported from."""
    own = [source.path, *source.adapters] if source.kind is not Kind.CHECKPOINT else []
    base = [source.base] if source.base and not options.adapter_only else []
    found = [*own, *source.earlier_adapters, *source.extra_file_folders, *base]
    if source.kind is Kind.CHECKPOINT:
        found = [each for each in found if each not in (source.path, *source.adapters)]
    if options.adapter_only:
        found = [each for each in found if each != source.base]
    return list(dict.fromkeys(found))


def _settings_and_weights(source: Source, options: Options, folder: Path) -> set[Path]:
    """The files of `folder` that are read: they do not have to be in the export."""
    used = {folder / name for name in ALWAYS_NEW}
    if folder == source.base or folder == source.path:
        used |= _weights(folder)
    if folder in (*source.adapters, *source.earlier_adapters):
        used |= {folder / SETTINGS, folder / WEIGHTS}
        if not (folder / WEIGHTS).is_file():
            used.add(folder / Path(WEIGHTS).with_suffix(".bin"))
    if source.adapter_config is not None:
        used.add(source.adapter_config)
    if not options.adapter_only:
        used.add(model_home(source) / CONFIG)
    if options.modelfile:
        used.add(folder / "Modelfile")
    if folder == template_folder(source):  # are put into the base's files
        used |= {folder / TEMPLATE, folder / TOKENIZER}
    return used


def _weights(folder: Path) -> set[Path]:
    """The files with the weights of a model folder, and their index."""
    try:
        files = weights_files(folder)
    except UserError:
        return set()  # a sharded checkpoint
    return {*files, *(each for file in files for each in folder.glob(f"*{file.suffix}.index.json"))}


def _reasons(
    source: Source, options: Options, folder: Path, copied: Mapping[str, Path]
) -> Iterator[tuple[str, str]]:
    """(name, why it is not copied) of each file of `folder` that is not."""
    found = files_of(folder)
    is_above = folder not in (source.path, source.base, *source.adapters, *source.earlier_adapters)
    if is_above:  # it contains other checkpoints, too
        files = {name: p for name, p in found.copied.items() if is_describing(p)}
    else:
        files = found.copied
        yield from ((name, why) for name, why in found.left.items() if name != CONFIG)
    if (config := folder / CONFIG).is_file():
        home = None if options.adapter_only else model_home(source)
        if home is not None and not _are_same(config, home / CONFIG):
            yield CONFIG, f"that of {home} is in the export"
    for name, path in files.items():
        if (other := copied.get(name)) is None or not _are_same(path, other):
            yield name, _reason(source, options, folder, name, other)


def _reason(source: Source, options: Options, folder: Path, name: str, other: Path | None) -> str:
    if is_of_tokenizer(name) and (tokenizer := tokenizer_folder(source)) not in (None, folder):
        return f"the tokenizer is that of {tokenizer}"
    if other is not None:
        return f"that of {other.parent} is in the export"
    if folder == source.base or options.adapter_only or source.base is None:
        return "does not apply to the export"
    return "not a file of the model"


def _is_used(path: Path, used: Collection[Path], is_sharded: bool) -> bool:
    """Whether it is a file that is used, or a folder with one. `is_sharded`: all files of a sharded
    checkpoint count as used."""
    is_shard = is_sharded and matches(path.name, SHARDS)
    return is_shard or path in used or any(path in file.parents for file in used)


def _are_same(one: Path, other: Path) -> bool:
    return one == other or (
        one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()
    )


def _by_reason(left: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(left.items()):
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{_enumerate(names)} ({reason})" for reason, names in by_reason.items())


def _enumerate(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
