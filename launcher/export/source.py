"""Recognizes SOURCE by its files, and finds the other folders that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders import links, manifest
from launcher.folders.adapter import SETTINGS, read_settings
from launcher.folders.checkpoint import (
    END_TOKENS,
    SCHEME,
    TRAINED_CLASS,
    Checkpoint,
    damage_and_way_out,
    describe_skipped,
    newest_checkpoint,
)
from launcher.folders.kind import SHARDED, Kind, is_run, kinds_of
from launcher.folders.model import CONFIG, whole_model_folder
from launcher.folders.run import RunDir
from launcher.folders.unknown_source import check_folder, explain, refusal
from launcher.io.new_tokens import extend
from launcher.io.readers import dcp, dcp_safetensors, universal, zero
from launcher.io.readers.found import FoundModel
from launcher.io.tokenizer_files import SETTINGS as TOKENIZER
from launcher.io.tokenizer_files import has_vocabulary, stated_template


@dataclass(frozen=True)
class Source:
    """The input of a consolidation.

    `read` returns the tensors of a sharded model; its argument is whether fp32 masters are wanted.
    It is None if the weights are those of `base`.
    """

    kind: Kind
    path: Path
    base: Path | None = None  # model folder with the weights that training started with
    read: Callable[[bool], FoundModel] | None = None
    adapters: tuple[Path, ...] = ()  # PEFT adapter folders
    # The config.json of the base, for an adapter alone; None: it is not on this machine.
    base_config: Path | None = None
    adapter_config: Path | None = None  # of the adapter in a sharded checkpoint
    extra_file_folders: tuple[Path, ...] = ()  # with config and tokenizer, in order of preference
    scheme: dict[str, Any] | None = None  # how training quantized the base, if SOURCE contains it
    partial: bool = False  # `read` returns only trained tensors; the others are those of `base`
    trained_class: str | None = None  # of transformers; None: SOURCE does not say it
    end_tokens: tuple[int, ...] | None = None  # that end an answer; None: not stated
    # Folder with the chat template and the EOS token of a tokenizer whose other files are the
    # base's: checkpoints of old versions have them in the form of one version of transformers.
    old_tokenizer: Path | None = None
    skipped: tuple[str, ...] = ()  # damaged checkpoints of the run that are newer, with the reason

    def describe(self) -> str:
        """SOURCE, its base, its adapters and what was skipped, one line for each."""
        moved = self.kind is Kind.CHECKPOINT and self.path.parent.is_symlink()
        parts = [
            f"source {self.path} ({self.kind.value})",
            f"which is in {self.path.parent.resolve()}" if moved else "",
            f"base {self.base}" if self.base else "",
        ]
        parts += [f"adapter {folder}" for folder in self.adapters if folder != self.path]
        return "\n".join(filter(None, [*parts, *self.skipped]))


def find_source(
    path: Path,
    base: str | None = None,
    adapters: Sequence[Path] = (),
    tag: str | None = None,
    adapter_only: bool = False,
) -> Source:
    """Recognize the folder `path`.

    Args:
        base: The base model, instead of the one that `path` names.
        adapters: Adapters to merge, if `path` is a model folder.
        tag: Which checkpoint of a DeepSpeed folder.
        adapter_only: No base is needed.

    Raises UserError if the folder is of no known kind or incomplete, or if an option would be
    ignored.
    """
    check_folder(path)
    if tag is not None and {Kind.RUN, Kind.CHECKPOINT} & {*kinds_of(path)}:
        raise UserError(
            f"--tag {tag} needs a DeepSpeed checkpoint as SOURCE, and {path} is of Shardway → "
            "leave --tag out; SOURCE may be one checkpoint of a run: RUN/checkpoints/step-…"
        )
    links.check_part(path)
    skipped: list[str] = []
    if is_run(path):
        checkpoints = RunDir(path).checkpoints
        path, skipped = newest_checkpoint(checkpoints).path, describe_skipped(checkpoints)
    kind = next(iter(kinds_of(path)), None)
    if kind is Kind.CHECKPOINT:
        source = replace(_checkpoint_source(path, base, adapter_only), skipped=tuple(skipped))
    elif tag is not None or kind in SHARDED:
        source = _sharded_source(path, base, tag, adapter_only)
    elif kind is Kind.ADAPTER:
        source = _adapter_source(path, base, adapter_only)
    elif kind is Kind.MODEL:
        source = _model_source(path, base, adapters)
    else:
        raise refusal(path)
    if adapters and source.kind is not Kind.MODEL:
        raise UserError(
            f"--adapter {adapters[0]} needs a model folder as SOURCE, and {path} is not one"
        )
    return source


def tokenizer_folder(source: Source) -> Path | None:
    """The folder of the tokenizer, None if there is none: the first with settings and a vocabulary.
    The training's folder comes before the base's: its tokenizer may have more tokens.

    Without such a folder it is the first with a vocabulary, or else with settings: some classes
    need no vocabulary.
    """
    folders = _tokenizer_folders(source)
    complete = (f for f in folders if (f / TOKENIZER).is_file() and has_vocabulary(f))
    with_vocabulary = (f for f in folders if has_vocabulary(f))
    with_settings = (f for f in folders if (f / TOKENIZER).is_file())
    return next(chain(complete, with_vocabulary, with_settings), None)


def template_folder(source: Source) -> Path | None:
    """The training's folder if it has a chat template but no vocabulary, and so not the tokenizer;
    None otherwise."""
    if (tokenizer := tokenizer_folder(source)) is None:
        return None
    before = takewhile(lambda folder: folder != tokenizer, _tokenizer_folders(source))
    return next((folder for folder in before if stated_template(folder) is not None), None)


def _tokenizer_folders(source: Source) -> tuple[Path, ...]:
    return (*source.extra_file_folders, *([source.base] if source.base else []))


def model_home(source: Source) -> Path:
    """The folder whose files describe the model: that of the base, or the first with a config."""
    return source.base or next(f for f in source.extra_file_folders if (f / CONFIG).is_file())


def _checkpoint_source(path: Path, base: str | None, adapter_only: bool) -> Source:
    checkpoint = Checkpoint(path)
    try:
        saved = checkpoint.summary()
        manifest.check(checkpoint.manifest)
    except UserError as error:
        raise UserError(damage_and_way_out(checkpoint, str(error))) from error
    recorded = saved["base"]
    if adapter_only and checkpoint.adapter is not None:
        return Source(
            Kind.CHECKPOINT,
            path,
            adapters=(checkpoint.adapter,),
            base_config=_base_config(base, recorded.get("name_or_path")),
            extra_file_folders=(path,),
            trained_class=saved.get(TRAINED_CLASS),
        )
    folder = _find_base(base, recorded.get("name_or_path"), recorded.get("revision"))
    if tokens := recorded.get("add_tokens"):
        folder = extend(folder, tokens)
    has_old = END_TOKENS not in saved and (path / TOKENIZER).is_file()
    is_old = has_old and (folder / TOKENIZER).is_file()
    source = Source(
        Kind.CHECKPOINT,
        path,
        folder,
        extra_file_folders=(folder,) if is_old else (path, folder),
        trained_class=saved.get(TRAINED_CLASS),
        end_tokens=None if saved.get(END_TOKENS) is None else tuple(saved[END_TOKENS]),
        old_tokenizer=path if is_old else None,
    )
    if checkpoint.adapter is not None:
        scheme = saved[SCHEME] if SCHEME in saved else None
        return replace(source, adapters=(checkpoint.adapter,), scheme=scheme)
    if (shards := checkpoint.model) is None:
        raise UserError(f"{path} has neither an adapter nor a folder model: it is damaged")
    partial = "partial" in saved and bool(saved["partial"])
    return replace(source, read=lambda _: dcp.read_model(shards), partial=partial)


def _adapter_source(path: Path, base: str | None, adapter_only: bool) -> Source:
    if adapter_only:
        recorded = read_settings(path / SETTINGS).get("base_model_name_or_path")
        config = _base_config(base, recorded)
        return Source(
            Kind.ADAPTER, path, adapters=(path,), base_config=config, extra_file_folders=(path,)
        )
    folder = _base_of_adapter(path / SETTINGS, base)
    folders = (path, folder)
    return Source(Kind.ADAPTER, path, folder, adapters=(path,), extra_file_folders=folders)


def _model_source(path: Path, base: str | None, adapters: Sequence[Path]) -> Source:
    if base is not None:
        raise UserError(f"SOURCE {path} is itself a model; leave out --base {base}")
    for adapter in adapters:
        if not (adapter / SETTINGS).is_file():
            raise UserError(f"--adapter {adapter} contains no {SETTINGS}")
    folders = (*adapters, path)
    return Source(Kind.MODEL, path, path, adapters=tuple(adapters), extra_file_folders=folders)


def _sharded_source(path: Path, base: str | None, tag: str | None, adapter_only: bool) -> Source:
    """A checkpoint of DeepSpeed or torch. Trainers save config and adapter_config in its folder or
    in one of the two folders above."""
    kind, read = _reader(path, tag)
    candidates = [path, *path.absolute().parents[:2]]
    settings = next((f / SETTINGS for f in candidates if (f / SETTINGS).is_file()), None)
    if adapter_only:
        folder: Path | None = None
    elif base is None and settings is not None:
        folder = _base_of_adapter(settings, None)
    else:
        folder = whole_model_folder(base, None) if base else None
    useful = (CONFIG, TOKENIZER)
    folders = [
        f for f in (*candidates, folder) if f and any((f / name).is_file() for name in useful)
    ]
    if not adapter_only and not any((f / CONFIG).is_file() for f in folders):
        raise UserError(
            f"SOURCE {path} ({kind.value}) has no config.json beside it; name its model with "
            "--base FOLDER"
        )
    config = None
    if adapter_only:
        recorded = read_settings(settings).get("base_model_name_or_path") if settings else None
        config = _base_config(base, recorded)
    return Source(
        kind,
        path,
        folder,
        read,
        base_config=config,
        adapter_config=settings,
        extra_file_folders=tuple(folders),
    )


def _reader(path: Path, tag: str | None) -> tuple[Kind, Callable[[bool], FoundModel]]:
    kinds = kinds_of(path)
    if tag is not None and Kind.ZERO not in kinds:
        raise UserError(
            f"--tag {tag} needs a DeepSpeed checkpoint as SOURCE, and {path} is not one"
        )
    kind = next(kind for kind in kinds if kind in SHARDED)
    readers: dict[Kind, Callable[[bool], FoundModel]] = {
        Kind.UNIVERSAL: lambda masters: universal.read_model(path, masters),
        Kind.ZERO: lambda masters: zero.read_model(path, tag, masters),
        Kind.DCP_SAFETENSORS: lambda _: dcp_safetensors.read_model(path),
        Kind.DCP: lambda _: dcp.read_model(path),
    }
    return kind, readers[kind]


def _base_config(base: str | None, recorded: Any) -> Path | None:
    """The config.json of the base that an adapter is for, if it is on this machine."""
    name = base or recorded
    file = Path(name) / CONFIG if isinstance(name, str) and name else None
    return file if file is not None and file.is_file() else None


def _base_of_adapter(settings: Path, base: str | None) -> Path:
    config = read_settings(settings)
    return _find_base(base, config.get("base_model_name_or_path"), config.get("revision"))


def _find_base(base: str | None, recorded: str | None, revision: str | None) -> Path:
    """The folder of the base model: `base`, otherwise the one that the training recorded."""
    name = base or recorded
    if not isinstance(name, str | None):
        raise UserError(f"base_model_name_or_path={name!r} is not a name; add --base FOLDER")
    if not name:
        raise UserError("the adapter does not name its base model; add --base FOLDER")
    folder = whole_model_folder(name, None if base else revision)
    if not (folder / CONFIG).is_file():
        reason = explain(folder) if folder.is_dir() else "does not exist"
        raise UserError(f"the base model {name} {reason}; name its folder with --base FOLDER")
    return folder
