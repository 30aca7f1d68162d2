"""Reads the files of a DeepSpeed ZeRO checkpoint, and checks that they are complete and of one
save.

Names and contents are those of deepspeed.runtime.engine (0.19): `*_model_states.pt`, one file for
stages 1 and 2 and one for each rank in stage 3, and one `*_optim_states.pt` for each rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.brief import brief
from launcher.folders.kind import ZERO3_STATES, ZERO_POINTER, ZERO_STATES
from launcher.folders.tensor_entries import is_inside
from launcher.io.readers.torch_file import read_file
from launcher.io.readers.unpickle import is_shape

MAX_TAG = 200  # letters of a folder's name
Shape = tuple[int, ...]
OPTIMIZER_STATES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
PARALLELISMS = (
    (re.compile(r"(layer_\d+|.*)_expert_.*|expp_rank_.*"), "expert parallelism"),
    (re.compile(r"layer_.*model_states\.pt"), "pipeline parallelism"),
)
UNSUPPORTED = "which is not supported; export it with the tool that trained it"


@dataclass(frozen=True)
class ZeroCheckpoint:
    """A checkpoint with complete files of one save."""

    folder: Path
    stage3: bool
    world_size: int
    # contents of *_model_states.pt: one, or one for each rank in stage 3
    model_states: tuple[dict[str, Any], ...]
    # of *_optim_states.pt, one for each rank; () if the files were deleted or not requested
    optimizer_states: tuple[dict[str, Any], ...]


def tag_folder(folder: Path, tag: str | None, pointer: str = ZERO_POINTER) -> Path:
    """The folder with the files: `tag` in `folder`, `folder` itself, or the one that the file
    `pointer` names. Raises UserError if there is none."""
    if tag is None and any(
        ZERO_STATES.fullmatch(p.name) or ZERO3_STATES.fullmatch(p.name) for p in _entries(folder)
    ):
        return folder
    if tag is None:
        try:
            tag = regular.read_text(folder / pointer).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder} contains neither a checkpoint nor {pointer}") from error
        if len(tag) > MAX_TAG or "\0" in tag or (tag and not is_inside(tag)):
            raise UserError(f"{folder / pointer} names {brief(tag)}, which is not in {folder}")
    if not tag or not (folder / tag).is_dir():
        tags = ", ".join(sorted(p.name for p in _entries(folder) if p.is_dir())) or "no folder"
        raise UserError(f"{folder / (tag or pointer)} is not a folder; {folder} contains {tags}")
    return folder / tag


def read_checkpoint(folder: Path, optimizers: bool = True) -> ZeroCheckpoint:
    """Read the pickles of all files. `optimizers`: also those of the optimizer.

    Raises UserError if a file is missing, stale or damaged, or if the model itself was split over
    ranks.
    """
    names = sorted(path.name for path in _entries(folder))
    for pattern, parallelism in PARALLELISMS:
        if matching := [name for name in names if pattern.fullmatch(name)]:
            raise UserError(f"{folder / matching[0]} is of {parallelism}, {UNSUPPORTED}")
    full, parts = _matches(ZERO_STATES, names), _matches(ZERO3_STATES, names)
    stage3 = bool(parts)
    if full and parts:
        raise UserError(f"{folder} contains files of two saves: {full[0][0]} and {parts[0][0]}")
    if not (full or parts):
        raise UserError(f"{folder} contains no *_model_states.pt: the save did not finish")
    if split := [m[0] for m in full if int(m[1])] or [m[0] for m in parts if int(m[2])]:
        raise UserError(f"{folder / split[0]} is of tensor parallelism, {UNSUPPORTED}")
    first = min(parts, key=lambda match: int(match[1])) if parts else full[0]
    state = _read_model_state(folder / first[0])
    world_size = _world_size(folder / first[0], state)
    if stage3:
        _check_ranks(folder, "model_states", [int(match[1]) for match in parts], world_size)
        states = [_read_model_state(folder / match[0]) for match in _sort_by_rank(parts, 1)]
    else:
        states = [state]
    _check_one_save(folder, states)
    files = _matches(OPTIMIZER_STATES, names)
    optimizer_states = (
        _read_optimizer_states(folder, files, world_size, stage3) if optimizers else ()
    )
    return ZeroCheckpoint(folder, stage3, world_size, tuple(states), optimizer_states)


def check_no_parallelism(file: Path, state: dict[str, Any]) -> None:
    """Raises UserError if the model itself was split over ranks."""
    degrees = state.get("checkpoint_parallel_dimensions") or {}
    parallelisms = {
        "tensor parallelism": max(state.get("mp_world_size", 1), degrees.get("tp_degree", 1)),
        "pipeline parallelism": degrees.get("pp_degree", 1),
        "expert parallelism": 2 if state.get("ds_autoep_layers") else 1,
    }
    for parallelism, degree in parallelisms.items():
        if degree > 1:
            raise UserError(f"{file} was saved under {parallelism}, {UNSUPPORTED}")
    if state.get("module") is None:
        raise UserError(f"{file} has no module: it is of pipeline parallelism, {UNSUPPORTED}")


def read_dict(file: Path) -> dict[str, Any]:
    """The dict that a DeepSpeed file contains. Raises UserError if it is something else."""
    content = read_file(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} contains a {type(content).__name__}: it is not a DeepSpeed file")
    return content


def _entries(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _matches(pattern: re.Pattern[str], names: list[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := pattern.fullmatch(name))]


def _sort_by_rank(matches: list[re.Match[str]], group: int) -> list[re.Match[str]]:
    return sorted(matches, key=lambda match: int(match[group]))


def _read_model_state(file: Path) -> dict[str, Any]:
    state = read_dict(file)
    check_no_parallelism(file, state)
    return state


def _world_size(file: Path, state: dict[str, Any]) -> int:
    world_size = state.get("dp_world_size")
    if type(world_size) is not int or world_size < 1:
        raise UserError(
            f"{file} does not contain the number of ranks that saved it "
            f"(dp_world_size={world_size})"
        )
    return world_size


def _check_ranks(folder: Path, kind: str, ranks: list[int], world_size: int) -> None:
    missing = next((rank for rank in range(world_size) if rank not in ranks), None)
    if missing is not None:
        raise UserError(
            f"{folder} lacks the {kind} file of rank {missing}; {world_size} ranks saved it"
        )
    if stale := sorted(rank for rank in ranks if rank >= world_size):
        raise UserError(
            f"{folder} contains a {kind} file of rank {stale[0]}, but {world_size} ranks saved it: "
            "remove the files of the older save"
        )


def _check_one_save(folder: Path, states: list[dict[str, Any]]) -> None:
    """Files of one save contain the same values under these keys."""
    for key in ("global_steps", "dp_world_size", "param_shapes", "frozen_param_shapes"):
        values = [_comparable(key, state.get(key)) for state in states]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise UserError(
                    f"{folder}: the files of ranks 0 and {rank} differ in {key}: they are of two "
                    "saves"
                )


def _comparable(key: str, value: Any) -> Any:
    """The value, checked: to compare arbitrary nested values can take for ever."""
    if key == "param_shapes":
        return [shapes_of(key, group) for group in value or []]
    if key == "frozen_param_shapes":
        return None if value is None else shapes_of(key, value)
    if not isinstance(value, int | None):
        raise ValueError(f"{key} is {brief(value)}")
    return value


def shapes_of(key: str, group: Any) -> dict[str, Shape]:
    """Name → shape, as under `key` of a file. Raises ValueError if it is something else."""
    for name, shape in group.items():
        if not (isinstance(name, str) and is_shape(shape)):
            raise ValueError(f"{key} gives {brief(name)} the shape {brief(shape)}")
    return {name: tuple(shape) for name, shape in group.items()}


def _read_optimizer_states(
    folder: Path, files: list[re.Match[str]], world_size: int, stage3: bool
) -> tuple[dict[str, Any], ...]:
    """The optimizer state of each rank, in the order of ranks. They may be missing unless it is
    stage 3."""
    if not files and not stage3:
        return ()
    if split := [match[0] for match in files if int(match[3])]:
        raise UserError(f"{folder / split[0]} is of tensor parallelism, {UNSUPPORTED}")
    if len({match[1] for match in files}) > 1:
        raise UserError(f"{folder} contains files of two saves: with and without bf16_ in the name")
    _check_ranks(folder, "optim_states", [int(match[2]) for match in files], world_size)
    states = []
    for match in _sort_by_rank(files, 2):
        file = folder / match[0]
        state = read_dict(file).get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise UserError(f"{file} has no optimizer_state_dict: it is not a ZeRO checkpoint")
        counts = state.get("partition_count")
        if {*(counts if isinstance(counts, list | tuple) else [counts])} != {world_size}:
            raise UserError(
                f"{file} contains partitions for {counts} ranks, not {world_size}: experts, MiCS "
                "and stale files cannot be read"
            )
        if (state.get("zero_stage", 0) == 3) != stage3:
            raise UserError(f"{file} is of ZeRO stage {state.get('zero_stage')}: of another save")
        states.append(state)
    return tuple(states)
