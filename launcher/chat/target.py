"""Recognizes what one can chat with by the files in its folder. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.adapter import SETTINGS, WEIGHTS, read_settings
from launcher.folders.checkpoint import (
    ADAPTER,
    MANIFEST,
    SCHEME,
    Checkpoint,
    damage_and_way_out,
    describe_skipped,
    finished_checkpoints,
    newest_checkpoint,
)
from launcher.folders.extended_model import extended_folder
from launcher.folders.file_names import PICKLES
from launcher.folders.kind import Kind, kinds_of
from launcher.folders.model import CONFIG, INDEX
from launcher.folders.model_config import read_model_config
from launcher.folders.model_files import EXPORT_MANIFEST
from launcher.folders.quantization import quantization_of
from launcher.folders.run import RunDir
from launcher.folders.tensor_entries import read_weight_map

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
UNFINISHED_NAME = r"\.?step-\d+(\.partial)?"  # of a checkpoint without a manifest
ACCEPTED_FOLDERS = "a model folder, an export, a PEFT adapter, a Shardway checkpoint or a run"


@dataclass(frozen=True)
class ChatTarget:
    """A model in safetensors, with its tokenizer and possibly an adapter."""

    kind: str  # export, model, adapter
    path: Path  # as given by the user, or the checkpoint found in it
    model: Path  # folder of the weights: of the model itself, or of the adapter's base
    tokenizer: Path  # folder of the tokenizer and its chat template
    adapter: Path | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: `adapter runs/first/checkpoints/step-000045 on base models/mine`."""
        on = f" on base {self.model}" if self.adapter else ""
        return f"{self.kind} {self.path}{on}"


def find_target(path: Path, base: Path | None = None) -> ChatTarget:
    """Recognize `path`. `base` overrides the model that an adapter names.

    Raises UserError if one cannot chat with `path` as it is, with the command that helps.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name {ACCEPTED_FOLDERS}")
    kinds = kinds_of(path)
    if Kind.RUN in kinds:
        return _run_target(path, base)
    if Kind.CHECKPOINT in kinds:
        return _checkpoint_target(Checkpoint(path), base)
    if Kind.ADAPTER in kinds:
        return _adapter_target(path, base)
    if Kind.MODEL in kinds:
        if base is not None:
            raise UserError(f"{path} is a model itself; leave --base {base} out")
        return _model_target(path)
    raise UserError(_not_usable_message(path, kinds))


def takes_base(path: Path) -> bool:
    """Whether --base applies to `path`: to an adapter, a checkpoint or a run, not to a model."""
    kinds = kinds_of(path)
    return Kind.MODEL not in kinds or bool({Kind.RUN, Kind.CHECKPOINT, Kind.ADAPTER} & {*kinds})


def check_weights(folder: Path) -> None:
    """Raises UserError if the weights of a model folder are not a complete set of safetensors."""
    index = folder / INDEX
    if index.is_file():
        files = set(read_weight_map(index).values())
        if missing := sorted(f for f in files if not (folder / f).is_file()):
            raise UserError(f"{index} lists missing files: {', '.join(missing[:5])}")
        return
    if (folder / "model.safetensors").is_file():
        return
    command = f"shardway consolidate {folder} --output DIR"
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has safetensors, but neither model.safetensors nor {INDEX}")
    if any(any(folder.glob(pattern)) for pattern in PICKLES):
        raise UserError(
            f"{folder} has its weights in pickles, which may run code when they are read; convert "
            f"them to safetensors: {command}"
        )
    raise UserError(f"{folder} has a config.json but no weights (model.safetensors, {INDEX})")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder contains a tokenizer file."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _run_target(path: Path, base: Path | None) -> ChatTarget:
    checkpoints = RunDir(path).checkpoints
    skipped = describe_skipped(checkpoints)
    if not finished_checkpoints(checkpoints):
        raise UserError(
            "; ".join(skipped)
            or f"{path} has no finished checkpoint yet; see its progress with shardway runs "
            f"{path.absolute().parent}"
        )
    target = _checkpoint_target(newest_checkpoint(checkpoints), base, run=path)
    return replace(target, notes=(*skipped, *target.notes))


def _checkpoint_target(
    checkpoint: Checkpoint, base: Path | None, run: Path | None = None
) -> ChatTarget:
    summary = checkpoint.summary()
    recorded_base = summary["base"]
    if checkpoint.adapter is None:
        raise UserError(_shards_message(checkpoint.path, run))
    adapter = checkpoint.adapter
    for name, entry in summary["files"].items():
        is_used = name.startswith(f"{ADAPTER}/") or name in TOKENIZER_FILES
        if is_used and (problem := manifest.problem(checkpoint.path / name, entry)):
            raise UserError(damage_and_way_out(checkpoint, problem))
    model = _find_base(checkpoint.manifest, base, recorded_base.get("name_or_path"))
    if tokens := recorded_base.get("add_tokens"):
        model = _with_new_tokens(checkpoint, model, tokens)
    notes: tuple[str, ...] = ()
    if summary.get(SCHEME):
        notes = (
            f"the adapter was trained on a quantized base; answers use the 16-bit one in {model}",
        )
    tokenizers = (checkpoint.path, adapter, model)
    return _adapter_on_base(checkpoint.path, adapter, model, tokenizers, notes)


def _adapter_target(path: Path, base: Path | None) -> ChatTarget:
    folder = path.absolute()
    if folder.name == ADAPTER and (folder.parent / MANIFEST).is_file():
        return _checkpoint_target(Checkpoint(folder.parent), base)  # it has the tokenizer
    settings = path / SETTINGS
    model = _find_base(settings, base, read_settings(settings).get("base_model_name_or_path"))
    return _adapter_on_base(path, path, model, (path, model), ())


def _adapter_on_base(
    path: Path, adapter: Path, model: Path, tokenizers: tuple[Path, ...], notes: tuple[str, ...]
) -> ChatTarget:
    """`tokenizers` are the folders that may contain the tokenizer; the first that does wins."""
    peft_type = read_settings(adapter / SETTINGS).get("peft_type")
    if peft_type != "LORA":
        raise UserError(f"{adapter / SETTINGS} has peft_type={peft_type!r}; only LORA is supported")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(
            f"{adapter} has no {WEIGHTS}; convert an adapter in a pickle (.bin) with shardway "
            f"consolidate {adapter} --adapter-only --output DIR"
        )
    check_weights(model)
    if quantization_of(read_model_config(model / CONFIG)):
        raise UserError(
            f"the base {model} is quantized, but an adapter needs the 16-bit model; name that "
            "with --base DIR"
        )
    tokenizer = next((folder for folder in tokenizers if has_tokenizer(folder)), None)
    if tokenizer is None:
        raise UserError(f"neither {path} nor its base {model} has a tokenizer")
    return ChatTarget("adapter", path, model, tokenizer, adapter, notes)


def _model_target(path: Path) -> ChatTarget:
    check_weights(path)
    read_model_config(path / CONFIG)
    if not has_tokenizer(path):
        raise UserError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer "
            "files into it"
        )
    kind = "export" if (path / EXPORT_MANIFEST).is_file() else "model"
    return ChatTarget(kind, path, path, path)


def _find_base(recorded_in: Path, given: Path | None, recorded: object) -> Path:
    """The folder of an adapter's base model. Raises UserError if it is not on this disk."""
    if given is not None:
        if not (given / CONFIG).is_file():
            raise UserError(f"--base {given} is not a model folder (no config.json)")
        return given
    if not isinstance(recorded, str) or not recorded:
        raise UserError(f"{recorded_in} does not name its base model; add --base DIR")
    if not (Path(recorded) / CONFIG).is_file():
        raise UserError(
            f"the base model {recorded} named in {recorded_in} is not a model folder on this disk; "
            "pass its folder with --base DIR"
        )
    return Path(recorded)


def _with_new_tokens(checkpoint: Checkpoint, base: Path, tokens: list[str]) -> Path:
    """The folder of `base` with the tokens that training added. Raises UserError if it is no longer
    in the cache."""
    folder = extended_folder(base, tokens)
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint.path} was trained with model.add_tokens=[{','.join(tokens)}], and the "
            f"base with these tokens is not in the cache ({folder}); make a model folder: shardway "
            f"consolidate {checkpoint.path} --output DIR"
        )
    return folder


def _shards_message(path: Path, run: Path | None) -> str:
    """For a checkpoint of full or freeze training. Names the run's export if it exists."""
    if run is not None and (RunDir(run).export / CONFIG).is_file():
        return f"{run} contains shards of a full model; its export is {RunDir(run).export}"
    output = RunDir(run).export if run is not None else "DIR"
    return (
        f"{path} contains shards of a full model; make a model folder first: shardway consolidate "
        f"{run or path} --output {output}"
    )


def _not_usable_message(path: Path, kinds: list[Kind]) -> str:
    if re.fullmatch(UNFINISHED_NAME, path.absolute().name):
        return f"{path} is not a finished checkpoint (no {MANIFEST}); name an earlier one"
    if Kind.STATE_DICT in kinds:
        return (
            f"{path} contains weights and no {CONFIG}; make a model folder first: shardway "
            f"consolidate {path} --base MODEL --output DIR"
        )
    if kinds or any(path.glob("global_step*")):
        return (
            f"{path} contains the shards of a trainer; make a model folder first: shardway "
            f"consolidate {path} --output DIR"
        )
    return (
        f"{path} is not a model folder (no {CONFIG}) or anything else to chat with; name "
        f"{ACCEPTED_FOLDERS}"
    )
