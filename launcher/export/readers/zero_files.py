"""The files of a DeepSpeed ZeRO checkpoint: which there must be, and whether they belong together.

Names and contents as deepspeed.runtime.engine writes them (0.19): one `*_model_states.pt` for
stages 1 and 2, one a rank for stage 3, and one `*_optim_states.pt` a rank for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.readers.torch_file import read_file

FULL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
PARALLEL = (
    (re.compile(r"(layer_\d+|.*)_expert_.*|expp_rank_.*"), "expert parallelism"),
    (re.compile(r"layer_.*model_states\.pt"), "pipeline parallelism"),
)
WAY_OUT = "which is not supported; export it with the tool that trained it"


@dataclass(frozen=True)
class Grid:
    """A checkpoint whose files are all there and of one save."""

    folder: Path
    stage3: bool
    ranks: int
    states: tuple[dict[str, Any], ...]  # contents of *_model_states.pt: one, or one a rank
    optimizers: tuple[dict[str, Any], ...]  # of *_optim_states.pt; none when they were removed


def tag_folder(folder: Path, tag: str | None, pointer: str = "latest") -> Path:
    """The folder with the files: `tag`, `folder` itself, or what the file `latest` names."""
    if tag is None and any(FULL.fullmatch(p.name) or PART.fullmatch(p.name) for p in _in(folder)):
        return folder
    if tag is None:
        try:
            tag = (folder / pointer).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"{folder} holds neither a checkpoint nor {pointer}") from error
    if not tag or not (folder / tag).is_dir():
        tags = ", ".join(sorted(p.name for p in _in(folder) if p.is_dir())) or "no folder"
        raise UserError(f"{folder / (tag or pointer)} is no folder; {folder} holds {tags}")
    return folder / tag


def find_grid(folder: Path, optimizers: bool = True) -> Grid:
    """Read the pickles of all files; those of the optimizer only if asked to.

    Raises UserError when any is missing, stale or damaged, or the model itself was split.
    """
    names = sorted(path.name for path in _in(folder))
    for pattern, what in PARALLEL:
        if found := [name for name in names if pattern.fullmatch(name)]:
            raise UserError(f"{folder / found[0]} is of {what}, {WAY_OUT}")
    full, parts = _matching(FULL, names), _matching(PART, names)
    stage3 = bool(parts)
    if full and parts:
        raise UserError(f"{folder} holds files of two saves: {full[0][0]} and {parts[0][0]}")
    if not (full or parts):
        raise UserError(f"{folder} holds no *_model_states.pt: the save did not finish")
    if several := [m[0] for m in full if int(m[1])] or [m[0] for m in parts if int(m[2])]:
        raise UserError(f"{folder / several[0]} is of tensor parallelism, {WAY_OUT}")
    first = min(parts, key=lambda match: int(match[1])) if parts else full[0]
    state = _state(folder / first[0])
    ranks = _ranks(folder / first[0], state)
    if stage3:
        _check_ranks(folder, "model_states", [int(match[1]) for match in parts], ranks)
    states = [_state(folder / match[0]) for match in _by_rank(parts, 1)] if stage3 else [state]
    _check_one_save(folder, states)
    files = _matching(OPTIMIZER, names)
    steps = _optimizers(folder, files, ranks, stage3) if optimizers else ()
    return Grid(folder, stage3, ranks, tuple(states), steps)


def check_no_parallelism(file: Path, state: dict[str, Any]) -> None:
    """Raises UserError when the model itself was split."""
    degrees = state.get("checkpoint_parallel_dimensions") or {}
    split = {
        "tensor parallelism": max(state.get("mp_world_size", 1), degrees.get("tp_degree", 1)),
        "pipeline parallelism": degrees.get("pp_degree", 1),
        "expert parallelism": 2 if state.get("ds_autoep_layers") else 1,
    }
    for what, degree in split.items():
        if degree > 1:
            raise UserError(f"{file} was saved under {what}, {WAY_OUT}")
    if state.get("module") is None:
        raise UserError(f"{file} holds no module: it is of pipeline parallelism, {WAY_OUT}")


def read_dict(file: Path) -> dict[str, Any]:
    content = read_file(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}: it is no DeepSpeed file")
    return content


def _in(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _matching(pattern: re.Pattern[str], names: list[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := pattern.fullmatch(name))]


def _by_rank(matches: list[re.Match[str]], group: int) -> list[re.Match[str]]:
    return sorted(matches, key=lambda match: int(match[group]))


def _state(file: Path) -> dict[str, Any]:
    state = read_dict(file)
    check_no_parallelism(file, state)
    return state


def _ranks(file: Path, state: dict[str, Any]) -> int:
    ranks = state.get("dp_world_size")
    if not isinstance(ranks, int) or ranks < 1:
        raise UserError(f"{file} does not say how many ranks saved it (dp_world_size={ranks})")
    return ranks


def _check_ranks(folder: Path, what: str, found: list[int], ranks: int) -> None:
    if lost := sorted(set(range(ranks)) - set(found)):
        raise UserError(f"{folder} lacks the {what} file of rank {lost[0]}; {ranks} ranks saved it")
    if stale := sorted(set(found) - set(range(ranks))):
        raise UserError(
            f"{folder} holds a {what} file of rank {stale[0]}, but {ranks} ranks saved it: remove "
            "the files of the older save"
        )


def _check_one_save(folder: Path, states: list[dict[str, Any]]) -> None:
    """Files of one save agree in what they say of it."""
    for key in ("global_steps", "dp_world_size", "param_shapes", "frozen_param_shapes"):
        for rank, state in enumerate(states):
            if state.get(key) != states[0].get(key):
                raise UserError(
                    f"{folder}: the files of ranks 0 and {rank} differ in {key}: they are of two "
                    "saves"
                )


def _optimizers(
    folder: Path, files: list[re.Match[str]], ranks: int, stage3: bool
) -> tuple[dict[str, Any], ...]:
    """The optimizer's state of each rank, in the order of ranks. Only stage 3 needs them."""
    if not files and not stage3:
        return ()
    if several := [match[0] for match in files if int(match[3])]:
        raise UserError(f"{folder / several[0]} is of tensor parallelism, {WAY_OUT}")
    if len({match[1] for match in files}) > 1:
        raise UserError(f"{folder} holds files of two saves: with and without bf16_ in the name")
    _check_ranks(folder, "optim_states", [int(match[2]) for match in files], ranks)
    states = []
    for match in _by_rank(files, 2):
        file = folder / match[0]
        state = read_dict(file).get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise UserError(f"{file} holds no optimizer_state_dict: it is no ZeRO checkpoint")
        counts = state.get("partition_count")
        if {*(counts if isinstance(counts, list | tuple) else [counts])} != {ranks}:
            raise UserError(
                f"{file} is of partitions among {counts} ranks, not {ranks}: experts, MiCS and "
                "stale files cannot be read"
            )
        if (state.get("zero_stage", 0) == 3) != stage3:
            raise UserError(f"{file} is of ZeRO stage {state.get('zero_stage')}: of another save")
        states.append(state)
    return tuple(states)
