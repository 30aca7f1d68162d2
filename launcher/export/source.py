"""What a SOURCE is, recognised by what is in it, and which other folders it needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.checkpoint import layout
from launcher.errors import UserError
from launcher.export.readers import dcp, dcp_safetensors, universal, zero
from launcher.export.readers.found import Found
from launcher.model.folder import model_folder
from launcher.run_dir import RunDir

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What is to be consolidated. `read` gives a sharded model's tensors; it is None when the
    weights are those of `base`. Its argument: whether fp32 masters are wanted."""

    kind: str
    path: Path
    base: Path | None = None  # model folder with the weights that training began with
    read: Callable[[bool], Found] | None = None
    adapters: tuple[Path, ...] = ()  # PEFT adapter folders
    adapter_config: Path | None = None  # of the adapter within a sharded checkpoint
    companions: tuple[Path, ...] = ()  # folders with config and tokenizer, the best first
    scheme: dict[str, Any] | None = None  # how training quantised the base, where SOURCE says so
    partial: bool = False  # what `read` gives was trained, the other tensors are those of `base`

    def describe(self) -> str:
        parts = [f"source {self.path} ({self.kind})", f"base {self.base}" if self.base else ""]
        parts += [f"adapter {folder}" for folder in self.adapters if folder != self.path]
        return "\n".join(filter(None, parts))


def find_source(
    path: Path,
    base: str | None = None,
    adapters: Sequence[Path] = (),
    tag: str | None = None,
    adapter_only: bool = False,
) -> Source:
    """Recognise `path` by what is in it; `base` and `adapters` override what it says. `tag`: which
    of a DeepSpeed folder's checkpoints. `adapter_only`: no base is looked for.

    Raises UserError when it is nothing known, or is not whole, or an option would be ignored.
    """
    if not path.is_dir():
        raise UserError(f"SOURCE {path} is no folder")
    run = RunDir(path)
    if run.config.is_file() and run.checkpoints.is_dir():
        path = layout.newest(run.checkpoints).path
    if (path / layout.MANIFEST).is_file():
        source = _checkpoint(path, base, adapter_only)
    elif tag is not None or (_is_sharded(path) and not _has_weights(path)):
        source = _sharded(path, base, tag, adapter_only)
    elif (path / ADAPTER_CONFIG).is_file():
        source = _adapter(path, base, adapter_only)
    elif (path / "config.json").is_file():
        source = _model(path, base, adapters)
    else:
        raise UserError(
            f"SOURCE {path} is neither a run (config.yaml, checkpoints/), a checkpoint "
            f"({layout.MANIFEST}), an adapter (adapter_config.json), a model (config.json) nor a "
            "sharded checkpoint of DeepSpeed (latest, *_model_states.pt) or torch (.metadata)"
        )
    if adapters and source.kind != "model folder":
        raise UserError(
            f"--adapter {adapters[0]} goes with a model folder, and SOURCE {path} is none"
        )
    return source


def tokenizer_folder(source: Source) -> Path | None:
    """Training's own folder before the base's: its tokenizer may have more tokens."""
    folders = (*source.companions, *([source.base] if source.base else []))
    return next((f for f in folders if (f / "tokenizer_config.json").is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError when it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    return content


def _checkpoint(path: Path, base: str | None, adapter_only: bool) -> Source:
    saved = manifest.check(path / layout.MANIFEST)
    if not {"step", "base"} <= saved.keys():
        raise UserError(f"{path / layout.MANIFEST} is no checkpoint's manifest")
    checkpoint = layout.Checkpoint(path)
    if adapter_only and checkpoint.adapter is not None:
        adapters = (checkpoint.adapter,)
        return Source("Shardway checkpoint", path, adapters=adapters, companions=(path,))
    folder = _base(base, saved["base"]["name_or_path"], saved["base"]["revision"])
    kind = "Shardway checkpoint"
    if checkpoint.adapter is not None:
        return Source(
            kind,
            path,
            folder,
            adapters=(checkpoint.adapter,),
            companions=(path, folder),
            scheme=saved["quantisation"] if "quantisation" in saved else None,
        )
    assert checkpoint.model is not None
    shards = checkpoint.model
    return Source(
        kind,
        path,
        folder,
        lambda _: dcp.read_model(shards),
        companions=(path, folder),
        partial="partial" in saved and bool(saved["partial"]),
    )


def _adapter(path: Path, base: str | None, adapter_only: bool) -> Source:
    if adapter_only:
        return Source("PEFT adapter", path, adapters=(path,), companions=(path,))
    folder = _base_of_adapter(path / ADAPTER_CONFIG, base)
    return Source("PEFT adapter", path, folder, adapters=(path,), companions=(path, folder))


def _model(path: Path, base: str | None, adapters: Sequence[Path]) -> Source:
    if base is not None:
        raise UserError(f"SOURCE {path} is a model itself; leave --base {base} out")
    for adapter in adapters:
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise UserError(f"--adapter {adapter} holds no {ADAPTER_CONFIG}")
    return Source(
        "model folder", path, path, adapters=tuple(adapters), companions=(*adapters, path)
    )


def _sharded(path: Path, base: str | None, tag: str | None, adapter_only: bool) -> Source:
    """A checkpoint of DeepSpeed or torch. Trainers keep config and adapter_config beside it."""
    kind, read = _reader(path, tag)
    beside = [path, *path.absolute().parents[:2]]
    settings = next((f / ADAPTER_CONFIG for f in beside if (f / ADAPTER_CONFIG).is_file()), None)
    if adapter_only:
        folder: Path | None = None
    elif base is None and settings is not None:
        folder = _base_of_adapter(settings, None)
    else:
        folder = model_folder(base, None) if base else None
    useful = ("config.json", "tokenizer_config.json")
    companions = [
        f for f in (*beside, folder) if f and any((f / name).is_file() for name in useful)
    ]
    if not adapter_only and not any((f / "config.json").is_file() for f in companions):
        raise UserError(
            f"SOURCE {path} ({kind}) has no config.json beside it; say with --base FOLDER which "
            "model it is"
        )
    return Source(kind, path, folder, read, (), settings, tuple(companions))


def _reader(path: Path, tag: str | None) -> tuple[str, Callable[[bool], Found]]:
    if tag is not None and not zero.recognises(path):
        raise UserError(f"--tag {tag} goes with a DeepSpeed checkpoint, and SOURCE {path} is none")
    if universal.recognises(path):
        return universal.KIND, lambda masters: universal.read_model(path, masters)
    if zero.recognises(path):
        return zero.KIND, lambda masters: zero.read_model(path, tag, masters)
    if dcp_safetensors.recognises(path):
        return dcp_safetensors.KIND, lambda _: dcp_safetensors.read_model(path)
    return dcp.KIND, lambda _: dcp.read_model(path)


def _is_sharded(path: Path) -> bool:
    return any(each.recognises(path) for each in (universal, zero, dcp_safetensors, dcp))


def _has_weights(path: Path) -> bool:
    """Whether whole weights lie beside a trainer's sharded state: they are taken then."""
    whole = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return (path / "config.json").is_file() and any((path / name).is_file() for name in whole)


def _base_of_adapter(settings: Path, given: str | None) -> Path:
    named = read_json(settings)
    return _base(given, named.get("base_model_name_or_path"), named.get("revision"))


def _base(given: str | None, recorded: str | None, revision: str | None) -> Path:
    name = given or recorded
    if not isinstance(name, str | None):
        raise UserError(f"base_model_name_or_path={name!r} is no name; add --base FOLDER")
    if not name:
        raise UserError("the adapter does not say which model it belongs to; add --base FOLDER")
    folder = model_folder(name, None if given else revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"the base model {name} is not there; say where it is with --base FOLDER")
    return folder
