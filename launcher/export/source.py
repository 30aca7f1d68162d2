"""Recognizes SOURCE by its files, and finds the other folders that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.bases import (
    Base,
    base_config,
    base_of_adapter,
    choose_adapter,
    find_base,
    named_adapters,
)
from launcher.export.readers import Reader, kind_of, reader_of
from launcher.folders import links, manifest
from launcher.folders.adapter import SETTINGS, read_settings
from launcher.folders.checkpoint import (
    ADAPTER,
    END_TOKENS,
    MANIFEST,
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
from launcher.folders.tensor_entries import tensor_names
from launcher.folders.unknown_source import check_folder, refusal
from launcher.io.adapter import contains_base, is_peft_state
from launcher.io.new_tokens import extend
from launcher.io.readers import dcp
from launcher.io.readers import model_folder as model_files
from launcher.io.tokenizer_files import SETTINGS as TOKENIZER

# Kinds of SOURCE that may contain several models.
WITH_KEYS = (*SHARDED, Kind.MODEL)


@dataclass(frozen=True)
class Source:
    """The input of a consolidation.

    `read` returns the tensors of a sharded model; its argument is whether fp32 masters are wanted.
    It is None if the weights are those of `base`.
    """

    kind: Kind
    path: Path
    base: Path | None = None  # model folder with the weights that training started with
    read: Reader | None = None
    adapters: tuple[Path, ...] = ()  # PEFT adapter folders
    # Adapter folders that were merged into `base`, one after the other, before training started.
    earlier_adapters: tuple[Path, ...] = ()
    adapter_name: str | None = None  # of the adapters in `read`; None: it has one
    model_key: str | None = None  # of several models in SOURCE; None: the one that was trained
    alpha: float | None = None  # of an adapter in `read` whose adapter_config.json is not known
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
    # The adapter that the settings of the adapter name as its base, which --base replaced.
    replaced: Path | None = None
    skipped: tuple[str, ...] = ()  # damaged checkpoints of the run that are newer, with the reason

    def describe(self) -> str:
        """SOURCE, its base, its adapters and what was skipped, one line for each."""
        moved = self.kind is Kind.CHECKPOINT and self.path.parent.is_symlink()
        parts = [
            f"source {self.path} ({self.kind.value})",
            f"which is in {self.path.parent.resolve()}" if moved else "",
            f"base {self.base}" if self.base else "",
        ]
        parts += [f"merged into it first: adapter {folder}" for folder in self.earlier_adapters]
        parts += [f"adapter {folder}" for folder in self.adapters if folder != self.path]
        if self.replaced is not None:
            parts.append(
                f"not merged: {self.replaced}, an adapter that the training names as its base and "
                f"--base replaces (--base {self.replaced} merges it first)"
            )
        if self.kind is Kind.ADAPTER and (others := named_adapters(self.path)):
            parts.append(f"not the adapters {', '.join(others)} (--adapter-name)")
        return "\n".join(filter(None, [*parts, *self.skipped]))


def find_source(
    path: Path,
    base: str | None = None,
    adapters: Sequence[Path] = (),
    tag: str | None = None,
    adapter_only: bool = False,
    adapter_name: str | None = None,
    alpha: float | None = None,
    model_key: str | None = None,
) -> Source:
    """Recognize the folder `path`.

    Args:
        base: The base model, instead of the one that `path` names.
        adapters: Adapters to merge, if `path` is a model folder.
        tag: Which checkpoint of a DeepSpeed folder.
        adapter_only: No base is needed.
        adapter_name: Which of several adapters.
        alpha: Of an adapter whose adapter_config.json is not known.
        model_key: Which of several models in a state (`launcher.io.readers.nesting`).

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
    path = choose_adapter(_checkpoint_of(path), adapter_name)
    kind = kind_of(path)
    if kind is Kind.CHECKPOINT:
        source = replace(_checkpoint_source(path, base, adapter_only), skipped=tuple(skipped))
    elif tag is not None or kind in SHARDED:
        source = _sharded_source(path, *reader_of(path, tag, model_key), base, adapter_only)
    elif kind is Kind.ADAPTER:
        source = _adapter_source(path, base, adapter_only)
    elif kind is Kind.MODEL:
        source = _model_source(path, base, adapters, adapter_only, alpha, model_key)
    else:
        raise refusal(path)
    _check_options(source, adapters, alpha, model_key)
    return replace(source, adapter_name=adapter_name, alpha=alpha, model_key=model_key)


def _check_options(
    source: Source, adapters: Sequence[Path], alpha: float | None, model_key: str | None
) -> None:
    """Raises UserError for an option that would be ignored."""
    if adapters and source.kind is not Kind.MODEL:
        raise UserError(
            f"--adapter {adapters[0]} needs a model folder as SOURCE, and {source.path} is not one "
            f"→ leave it out, or shardway consolidate MODEL --adapter {adapters[0]}"
        )
    if model_key is not None and source.kind not in WITH_KEYS:
        raise UserError(
            f"--model-key {model_key} needs the state of a trainer as SOURCE, and "
            f"{source.path} is a {source.kind.value} → leave --model-key out"
        )
    if alpha is not None and (source.read is None or source.adapter_config is not None):
        raise UserError(
            f"--alpha {alpha:g} needs an adapter whose adapter_config.json is not known, and "
            f"{source.adapter_config or source.path} has its alpha → leave --alpha out"
        )


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
            base_config=base_config(base, recorded.get("name_or_path")),
            extra_file_folders=(path,),
            trained_class=saved.get(TRAINED_CLASS),
        )
    folder = find_base(base, recorded.get("name_or_path"), recorded.get("revision"))
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


def _checkpoint_of(path: Path) -> Path:
    """The Shardway checkpoint that the adapter `path` is a part of, which has its tokenizer;
    otherwise `path`."""
    is_part = path.name == ADAPTER and (path.parent / MANIFEST).is_file()
    return path.parent if is_part else path


def _adapter_source(path: Path, base: str | None, adapter_only: bool) -> Source:
    if adapter_only:
        recorded = read_settings(path / SETTINGS).get("base_model_name_or_path")
        config = base_config(base, recorded)
        return Source(
            Kind.ADAPTER, path, adapters=(path,), base_config=config, extra_file_folders=(path,)
        )
    found = base_of_adapter(path / SETTINGS, base)
    return Source(
        Kind.ADAPTER,
        path,
        found.folder,
        adapters=(path,),
        earlier_adapters=found.adapters,
        replaced=found.replaced,
        extra_file_folders=(path, *reversed(found.adapters), found.folder),
    )


def _model_source(
    path: Path,
    base: str | None,
    adapters: Sequence[Path],
    adapter_only: bool,
    alpha: float | None,
    key: str | None,
) -> Source:
    """A model folder. If its weights are the state of a PEFT model, it is a checkpoint."""
    is_adapted = (path / SETTINGS).is_file() or alpha is not None
    names = tensor_names(path) if key is None else set()
    names = names or {*model_files.read_model(path, key).tensors}
    if not adapters and is_peft_state(names, is_adapted):
        return _sharded_source(
            *(path, Kind.MODEL, lambda _: model_files.read_model(path, key), base, adapter_only),
            needs_base=not contains_base(names),
        )
    if base is not None:
        raise UserError(f"SOURCE {path} is itself a model; leave out --base {base}")
    for adapter in adapters:
        if not (adapter / SETTINGS).is_file():
            raise UserError(f"--adapter {adapter} contains no {SETTINGS}")
    folders = (*adapters, path)
    return Source(Kind.MODEL, path, path, adapters=tuple(adapters), extra_file_folders=folders)


def _sharded_source(
    path: Path,
    kind: Kind,
    read: Reader,
    base: str | None,
    adapter_only: bool,
    needs_base: bool = True,
) -> Source:
    """A checkpoint of DeepSpeed or torch, or a state dict. Trainers save config and adapter_config
    in its folder or in one of the two folders above.

    `needs_base`: whether an adapter in it is merged into the base that its settings name.
    """
    candidates = [path, *path.absolute().parents[:2]]
    settings = next((f / SETTINGS for f in candidates if (f / SETTINGS).is_file()), None)
    found: Base | None = None
    if not adapter_only and settings is not None and (base or needs_base):
        found = base_of_adapter(settings, base)
    elif not adapter_only and base:
        found = Base(whole_model_folder(base, None))
    folder = found.folder if found else None
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
        config = base_config(base, recorded)
    return Source(
        kind,
        path,
        folder,
        read,
        base_config=config,
        earlier_adapters=found.adapters if found else (),
        replaced=found.replaced if found else None,
        adapter_config=settings,
        extra_file_folders=tuple(folders),
    )
