"""Recognize what a folder contains by the names of its files. Imports no torch.

Export, chat, serve, the page and the rules all use this module.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

from launcher.folders.adapter import SETTINGS
from launcher.folders.adapter import WEIGHTS as ADAPTER_WEIGHTS
from launcher.folders.checkpoint import MANIFEST
from launcher.folders.file_names import is_weights_file
from launcher.folders.model import CONFIG, INDEX, WEIGHTS
from launcher.folders.run import RunDir


class Kind(StrEnum):
    """What a folder contains; the value is the name in messages."""

    RUN = "run"
    CHECKPOINT = "Shardway checkpoint"
    ADAPTER = "PEFT adapter"
    MODEL = "model folder"
    UNIVERSAL = "DeepSpeed universal checkpoint"
    ZERO = "DeepSpeed ZeRO checkpoint"
    DCP_SAFETENSORS = "sharded safetensors of PyTorch's distributed checkpoint"
    DCP = "PyTorch distributed checkpoint (DCP)"
    STATE_DICT = "weights without a config.json"


# The state of a trainer, sharded over the files of several ranks or in one.
SHARDED = (Kind.UNIVERSAL, Kind.ZERO, Kind.DCP_SAFETENSORS, Kind.DCP, Kind.STATE_DICT)

ADAPTER_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")
# File names of DeepSpeed (deepspeed.runtime.engine, 0.19).
ZERO_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ZERO3_STATES = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
ZERO_POINTER, UNIVERSAL_POINTER = "latest", "latest_universal"
# File names of torch.distributed.checkpoint, accelerate and others that save one file per rank.
DCP_SHARD = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")
DCP_SUBFOLDER = "sharded"  # by the safetensors writer with enable_consolidation
ACCELERATE = "pytorch_model_fsdp_*"  # accelerate's folder for a model's DCP files
# Files that cannot be exported: pattern → what the file is, and what to do instead.
UNREADABLE = {
    r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin": (
        "one of accelerate's files per rank (LOCAL_ or SHARDED_STATE_DICT without DCP), which do "
        "not contain the tensors' full shapes; save with fsdp_state_dict_type: SHARDED_STATE_DICT"
    ),
    r"model_world_size_\d+_rank_\d+\.pt": (
        "one of verl's files per rank; merge them with verl's model merger"
    ),
    r"__\d+\.metadata": (
        "the metadata of a single rank (saved without collectives); save with use_collectives=True"
    ),
}


def kinds_of(path: Path) -> list[Kind]:
    """All kinds that `path` matches, the most specific first. Empty if it is not a folder or is
    unknown.

    A folder may contain a trainer's sharded state and the unsharded weights of the same step:
    unsharded weights come first.
    """
    if not path.is_dir():
        return []
    names = [file.name for file in path.iterdir()]
    shardway = [Kind.RUN] if is_run(path) else []
    shardway += [Kind.CHECKPOINT] if MANIFEST in names else []
    has_adapter = SETTINGS in names and not {*ADAPTER_FILES}.isdisjoint(names)
    has_model = CONFIG in names and not {WEIGHTS, INDEX}.isdisjoint(names)
    sharded = _sharded_kinds(path, names)
    has_state = not sharded and any(map(is_weights_file, names))
    unsharded = [Kind.ADAPTER] if has_adapter or (SETTINGS in names and not has_state) else []
    unsharded += [Kind.MODEL] if CONFIG in names else []
    unsharded += [Kind.STATE_DICT] if has_state and not unsharded else []
    return shardway + (unsharded + sharded if has_adapter or has_model else sharded + unsharded)


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run that has started."""
    run = RunDir(path)
    return run.has_config and run.checkpoints.is_dir()


def _sharded_kinds(path: Path, names: list[str]) -> list[Kind]:
    matches = {
        Kind.UNIVERSAL: _is_universal(path, names),
        Kind.ZERO: _is_zero(names),
        Kind.DCP_SAFETENSORS: bool(dcp_shards(path) or dcp_shards(path / DCP_SUBFOLDER)),
        Kind.DCP: _is_dcp(path, names),
    }
    return [kind for kind, is_match in matches.items() if is_match]


def _is_universal(path: Path, names: list[str]) -> bool:
    """Whether the folder is one, or points to one and not also to the ZeRO checkpoint it was made
    from."""
    return (path / "zero").is_dir() or (UNIVERSAL_POINTER in names and ZERO_POINTER not in names)


def _is_zero(names: list[str]) -> bool:
    """Whether the folder contains a ZeRO checkpoint, or `latest`, which points to one."""
    states = any(ZERO_STATES.fullmatch(name) or ZERO3_STATES.fullmatch(name) for name in names)
    return "zero" not in names and (states or ZERO_POINTER in names)


def dcp_shards(path: Path) -> dict[Path, re.Match[str]]:
    """The shard files of DCP's safetensors writer in `path`, with the match of their names."""
    matches = {
        file: DCP_SHARD.fullmatch(file.name) for file in sorted(path.glob("shard-*.safetensors"))
    }
    return {file: match for file, match in matches.items() if match}


def _is_dcp(path: Path, names: list[str]) -> bool:
    """Whether the folder, or accelerate's folder in it, is a DCP save, complete or not."""
    return (
        any(name == ".metadata" or name.endswith(".distcp") for name in names)
        or any(re.fullmatch(pattern, name) for pattern in UNREADABLE for name in names)
        or any(
            _is_dcp(inner, [file.name for file in inner.iterdir()])
            for inner in path.glob(ACCELERATE)
            if inner.is_dir()
        )
    )
