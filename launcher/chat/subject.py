"""What can be talked to, recognised by what is in its folder. Imports no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.checkpoint import layout
from launcher.config.adapter import SETTINGS, WEIGHTS
from launcher.errors import UserError
from launcher.run_dir import RunDir

INDEX = "model.safetensors.index.json"
EXPORTED = "consolidation_manifest.json"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARDS = ("latest", ".metadata", "*.distcp", "*_model_states.pt", "zero", "global_step*")
UNFINISHED = r"\.?step-\d+(\.partial)?"
ANY_FAMILY = "a model folder, an export, a PEFT adapter, a Shardway checkpoint or a run"


@dataclass(frozen=True)
class Subject:
    """A model in safetensors, and what goes with it."""

    kind: str  # export, model, adapter
    path: Path  # as it was named, or the checkpoint that was found in it
    model: Path  # folder of the weights: of the model itself, or of the adapter's base
    tokenizer: Path  # folder of the tokenizer and its chat template
    adapter: Path | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: `adapter runs/first/checkpoints/step-000045 on base models/mine`."""
        on = f" on base {self.model}" if self.adapter else ""
        return f"{self.kind} {self.path}{on}"


def find(path: Path, base: Path | None = None) -> Subject:
    """Recognise `path`; `base` overrides the model that an adapter names.

    Raises UserError when nothing there can be talked to as it is, with the command that helps.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder; name {ANY_FAMILY}")
    if is_run(path):
        return _run(path, base)
    if (path / layout.MANIFEST).is_file():
        return _checkpoint(layout.Checkpoint(path), base)
    if (path / SETTINGS).is_file():
        return _adapter(path, base)
    if (path / "config.json").is_file():
        if base is not None:
            raise UserError(f"{path} is a model itself; leave --base {base} out")
        return _model(path)
    raise UserError(_nothing(path))


def is_run(path: Path) -> bool:
    run = RunDir(path)
    return run.config.is_file() and run.checkpoints.is_dir()


def takes_base(path: Path) -> bool:
    """Whether `path` is, or holds, something that --base may be said of: no model itself."""
    whole = (path / "config.json").is_file() and not (path / SETTINGS).is_file()
    return not whole or is_run(path) or (path / layout.MANIFEST).is_file()


def check_weights(folder: Path) -> None:
    """Raises UserError when the weights of a model folder are not whole safetensors files."""
    index = folder / INDEX
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f"{index} has no weight_map; consolidate {folder} anew")
        if lost := sorted(f for f in set(files.values()) if not (folder / f).is_file()):
            raise UserError(f"{index} lists {', '.join(lost[:5])}, which is not there")
        return
    if (folder / "model.safetensors").is_file():
        return
    command = f"shardway consolidate {folder} --output DIR"
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has safetensors files and neither model.safetensors nor {INDEX}")
    if any(any(folder.glob(kind)) for kind in PICKLES):
        raise UserError(
            f"{folder} has its weights in pickles, which may run code when they are read; make "
            f"safetensors of them: {command}"
        )
    raise UserError(f"{folder} has a config.json and no weights (model.safetensors, {INDEX})")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER)


def _run(path: Path, base: Path | None) -> Subject:
    if not layout.finished(RunDir(path).checkpoints):
        raise UserError(
            f"{path} has no finished checkpoint yet; see how far it is with shardway runs "
            f"{path.absolute().parent}"
        )
    return _checkpoint(layout.newest(RunDir(path).checkpoints), base, run=path)


def _checkpoint(found: layout.Checkpoint, base: Path | None, run: Path | None = None) -> Subject:
    saved = found.summary()
    recorded = saved.get("base")
    if not isinstance(recorded, dict):
        raise UserError(f"{found.manifest} is no checkpoint's manifest")
    if found.adapter is None:
        raise UserError(_sharded(found.path, run))
    adapter = found.adapter
    for name, entry in saved["files"].items():
        used = name.startswith(f"{layout.ADAPTER}/") or name in TOKENIZER
        if used and (wrong := manifest.problem(found.path / name, entry)):
            raise UserError(f"{wrong}; name an earlier checkpoint")
    model = _base(found.manifest, base, recorded.get("name_or_path"))
    notes: tuple[str, ...] = ()
    if saved.get("quantisation"):
        notes = (
            f"the adapter was trained on a quantised base; it answers on the 16-bit one in {model}",
        )
    return _with_adapter(found.path, adapter, model, (found.path, adapter, model), notes)


def _adapter(path: Path, base: Path | None) -> Subject:
    whole = path.absolute()
    if whole.name == layout.ADAPTER and (whole.parent / layout.MANIFEST).is_file():
        return _checkpoint(layout.Checkpoint(whole.parent), base)  # with its tokenizer
    settings = path / SETTINGS
    model = _base(settings, base, _read_json(settings).get("base_model_name_or_path"))
    return _with_adapter(path, path, model, (path, model), ())


def _with_adapter(
    path: Path, adapter: Path, model: Path, tokenizers: tuple[Path, ...], notes: tuple[str, ...]
) -> Subject:
    kind = _read_json(adapter / SETTINGS).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{adapter / SETTINGS} has peft_type={kind!r}; only LORA is talked to")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(
            f"{adapter} has no {WEIGHTS}; of an adapter in a pickle (.bin) make one with shardway "
            f"consolidate {adapter} --adapter-only --output DIR"
        )
    check_weights(model)
    if _read_json(model / "config.json").get("quantization_config"):
        raise UserError(
            f"the base {model} is quantised, and an adapter goes onto the 16-bit model; name that "
            "with --base DIR"
        )
    tokenizer = next((f for f in tokenizers if has_tokenizer(f)), None)
    if tokenizer is None:
        raise UserError(f"neither {path} nor its base {model} holds a tokenizer")
    return Subject("adapter", path, model, tokenizer, adapter, notes)


def _model(path: Path) -> Subject:
    check_weights(path)
    _read_json(path / "config.json")
    if not has_tokenizer(path):
        raise UserError(
            f"{path} holds no tokenizer ({', '.join(TOKENIZER)}); copy the files of the model's "
            "there"
        )
    kind = "export" if (path / EXPORTED).is_file() else "model"
    return Subject(kind, path, path, path)


def _base(named_in: Path, given: Path | None, recorded: Any) -> Path:
    """The folder of an adapter's base model. Raises UserError when it is not on this disk."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise UserError(f"--base {given} is no model folder (no config.json)")
        return given
    if not isinstance(recorded, str) or not recorded:
        raise UserError(f"{named_in} does not say which model it belongs to; add --base DIR")
    if not (Path(recorded) / "config.json").is_file():
        raise UserError(
            f"the base model {recorded} that {named_in} names is no model folder on this disk; say "
            "where it is with --base DIR"
        )
    return Path(recorded)


def _sharded(path: Path, run: Path | None) -> str:
    """Whole-model training keeps shards; where the run was exported already, that is named."""
    if run is not None and (RunDir(run).export / "config.json").is_file():
        return f"{run} holds shards of a whole model; its export is {RunDir(run).export}"
    where = RunDir(run).export if run is not None else "DIR"
    return (
        f"{path} holds shards of a whole model; make a model folder first: shardway consolidate "
        f"{run or path} --output {where}"
    )


def _nothing(path: Path) -> str:
    if re.fullmatch(UNFINISHED, path.absolute().name):
        return f"{path} is no finished checkpoint (no {layout.MANIFEST}); name an earlier one"
    if any(any(path.glob(kind)) for kind in SHARDS):
        return (
            f"{path} holds a trainer's shards; make a model folder first: shardway consolidate "
            f"{path} --output DIR"
        )
    return (
        f"{path} is no model folder (no config.json) and nothing else that can be talked to: name "
        f"{ANY_FAMILY}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object")
    return content
