"""A DeepSpeed ZeRO checkpoint as a model.

Stages 1 and 2 save the working weights whole. Their masters, and all of stage 3, are flat vectors
cut among the ranks: under stages 1 and 2 each group's vector into one stretch a rank, under stage 3
every parameter into ⌈elements / ranks⌉ a rank (deepspeed.utils.zero_to_fp32). What
`param_slice_mappings` says is never used: it does not know the order of round_robin_gradients.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.readers.folder import shared
from launcher.export.readers.found import Found
from launcher.export.readers.prefixes import cleaned, dropped
from launcher.export.readers.torch_file import tensors_in
from launcher.export.readers.zero_files import FULL, PART, Grid, find_grid, tag_folder
from launcher.export.tensor import Tensor
from launcher.export.tensor.stored import Piece, Stored, run_pieces

KIND = "DeepSpeed ZeRO checkpoint"
NO_FROZEN = "the checkpoint was saved without its frozen parameters (exclude_frozen_parameters)"
Shape = tuple[int, ...]


def recognises(folder: Path) -> bool:
    """Whether `folder` holds a ZeRO checkpoint, or `latest`, which names one."""
    if not folder.is_dir() or (folder / "zero").is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return any(FULL.fullmatch(name) or PART.fullmatch(name) for name in names) or (
        (folder / "latest").is_file()
    )


def read_model(folder: Path, tag: str | None = None, masters: bool = False) -> Found:
    """The weights in the dtype that they were trained in, or (`masters`) the optimizer's masters.

    `tag`: which checkpoint of `folder`, instead of the one that `latest` names. Raises UserError
    when files are missing, stale or damaged, or the model itself was split among ranks.
    """
    grid = find_grid(tag_folder(folder, tag))
    tensors = _stage3(grid, masters) if grid.stage3 else _stage12(grid, masters)
    return named(grid.folder, tensors, grid.states[0], _notes(grid))


def named(
    folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], notes: tuple[str, ...] = ()
) -> Found:
    """Tensors under clean names, tied ones once: as `shared_params` and their storages say."""
    tied = {k: v for k, v in (state.get("shared_params") or {}).items() if v in tensors}
    tied = {**shared({k: v for k, v in tensors.items() if k not in tied}), **tied}
    kept = {name: each for name, each in tensors.items() if name not in tied}
    short = cleaned([*kept, *tied], folder)
    stepped = {name for group in shapes_of(state) for name in group}
    return Found(
        {short[name]: each.called(short[name]) for name, each in kept.items() if name in short},
        {short[name]: short[_end(tied, name)] for name in tied if name in short},
        notes,
        frozenset(short[name] for name in stepped if name in short),
    )


def live_dtype(state: dict[str, Any]) -> torch.dtype | None:
    """The dtype that training computed in; None: that of the masters."""
    config = state.get("ds_config")
    config = config if isinstance(config, dict) else {}
    for section, dtype in (
        ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)
    ):  # fmt: skip
        if (config.get(section) or {}).get("enabled") is True:
            return dtype
    return None


def shapes_of(state: dict[str, Any]) -> list[dict[str, Shape]]:
    """Name → shape of what the optimizer steps: a dict a group, in the order of its vector."""
    groups = state.get("param_shapes") or []
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def frozen(folder: Path, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stage 3's frozen parameters, put together from every rank's fragment."""
    found: dict[str, Tensor] = {}
    for name, size in (states[0].get("frozen_param_shapes") or {}).items():
        shape = tuple(size)
        fragments = [
            _Vector.of(folder, [state["frozen_param_fragments"][name]]) for state in states
        ]
        found[name] = _interleaved(folder, name, shape, fragments, 0)
    return found


def buffers(folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """Stage 3's persistent buffers; what else `module` names is empty."""
    module, _ = tensors_in(state["module"], folder)
    return {name: module[name] for name in state.get("buffer_names") or () if name in module}


@dataclass(frozen=True)
class _Vector:
    """A flat vector in files: stretches, and the element at which each begins."""

    dtype: torch.dtype
    stretches: tuple[Piece, ...]
    begins: tuple[int, ...]
    count: int

    @staticmethod
    def of(folder: Path, parts: Sequence[Any]) -> _Vector:
        """Stored vectors one after the other. Raises UserError when they are of several dtypes."""
        dtypes = {part.dtype for part in parts}
        if len(dtypes) > 1 or not all(isinstance(part, Stored) for part in parts):
            raise UserError(f"{folder}: its flat groups are of {sorted(map(str, dtypes))}")
        stretches = tuple(piece for part in parts for piece in part.pieces)
        ends = list(itertools.accumulate((piece.size for piece in stretches), initial=0))
        dtype = dtypes.pop() if dtypes else torch.float32
        return _Vector(dtype, stretches, tuple(ends[:-1]), ends[-1])

    def cut(self, begin: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """(file, byte, elements) of the stretches that make up [begin, begin + count)."""
        at = bisect.bisect_right(self.begins, begin) - 1
        while count:
            inside = begin - self.begins[at]
            some = min(count, self.stretches[at].size - inside)
            place = self.stretches[at].begin + inside * self.dtype.itemsize
            yield self.stretches[at].file, place, some
            at, begin, count = at + 1, begin + some, count - some


def _stage12(grid: Grid, masters: bool) -> dict[str, Tensor]:
    module, _ = tensors_in(grid.states[0]["module"], grid.folder)
    if not masters:
        return module
    if not grid.optimizers:
        raise UserError(f"{grid.folder} holds no *_optim_states.pt, and so no master weights")
    return module | dict(_masters12(grid))


def _masters12(grid: Grid) -> Iterator[tuple[str, Tensor]]:
    groups = shapes_of(grid.states[0])
    flats = _flat_groups(grid, "single_partition_of_fp32_groups", len(groups))
    paddings = grid.optimizers[0].get("param_alignment_paddings") or [[0] * len(g) for g in groups]
    for number, shapes in enumerate(groups):
        vector = _Vector.of(grid.folder, [parts[number] for parts in flats])
        after = paddings[number]
        counts = [math.prod(shape) for shape in shapes.values()]
        begins = list(itertools.accumulate(map(sum, zip(counts, after, strict=True)), initial=0))
        _check_length(grid, vector.count, begins, counts)
        for (name, shape), begin, count in zip(shapes.items(), begins, counts, strict=False):
            pieces: list[Piece] = []
            at = 0
            for file, byte, some in vector.cut(begin, count):
                pieces += run_pieces(file, byte, at, some, shape, vector.dtype.itemsize)
                at += some
            yield name, Stored(name, vector.dtype, shape, tuple(pieces))


def _flat_groups(grid: Grid, key: str, count: int) -> list[list[Any]]:
    """Each rank's list of flat vectors, one a group. Raises UserError when there are others."""
    found = [state.get(key) for state in grid.optimizers]
    for rank, groups in enumerate(found):
        if not isinstance(groups, list) or len(groups) != count:
            what = len(groups) if isinstance(groups, list) else "no"
            raise UserError(
                f"{grid.folder}: the optim_states of rank {rank} hold {what} {key}, and {count} "
                "groups were trained: it is damaged or of another save"
            )
    return [list(groups) for groups in found if groups is not None]


def _check_length(grid: Grid, length: int, begins: list[int], counts: list[int]) -> None:
    """The vector must hold all parameters, and no more than its own padding beyond them."""
    needed = begins[-2] + counts[-1] if counts else 0
    unit = 2 * grid.ranks  # to which DeepSpeed pads the vector
    if not needed <= length <= -(-begins[-1] // unit) * unit:
        raise _offloaded(grid.folder, length, needed)


def _stage3(grid: Grid, masters: bool) -> dict[str, Tensor]:
    groups = shapes_of(grid.states[0])
    flats = _flat_groups(grid, "fp32_flat_groups", len(groups))
    vectors = [_Vector.of(grid.folder, parts) for parts in flats]
    live = None if masters else live_dtype(grid.states[0])
    tensors: dict[str, Tensor] = {}
    at = 0
    for shapes in groups:
        for name, shape in shapes.items():
            tensors[name] = _interleaved(grid.folder, name, shape, vectors, at)
            at += -(-math.prod(shape) // grid.ranks)
    for vector in vectors:
        if vector.count != at:
            raise _offloaded(grid.folder, vector.count, at)
    if live is not None:
        tensors = {name: tensor.to(live) for name, tensor in tensors.items()}
    return tensors | frozen(grid.folder, grid.states) | buffers(grid.folder, grid.states[0])


def _interleaved(
    folder: Path, name: str, shape: Shape, vectors: Sequence[_Vector], at: int
) -> Stored:
    """A parameter of which every rank has the same count of elements, at `at` of its vector."""
    total = math.prod(shape)
    each = -(-total // len(vectors))
    pieces: list[Piece] = []
    for rank, vector in enumerate(vectors):
        begin = min(rank * each, total)
        count = min(each, total - begin)
        if vector.count < at + count:
            raise _offloaded(folder, vector.count, at + count)
        for file, byte, some in vector.cut(at, count):
            pieces += run_pieces(file, byte, begin, some, shape, vector.dtype.itemsize)
            begin += some
    return Stored(name, vectors[0].dtype, shape, tuple(pieces))


def _offloaded(folder: Path, found: int, needed: int) -> UserError:
    why = "they were offloaded to NVMe" if found == 0 else "it is damaged or of another save"
    return UserError(
        f"{folder}: a rank's flat groups hold {found} elements where the parameters need {needed}: "
        f"{why}, and cannot be read"
    )


def _notes(grid: Grid) -> tuple[str, ...]:
    """Stage 1 never lists frozen parameters, later stages always unless they were left out."""
    state = grid.states[0]
    _, others = tensors_in(state["module"], grid.folder)
    stage = grid.optimizers[0].get("zero_stage") if grid.optimizers else None
    missing = stage in (2, 3) and state.get("frozen_param_shapes") is None
    return (*dropped(others, "that are no tensors"), *((NO_FROZEN,) if missing else ()))


def _end(tied: dict[str, str], name: str) -> str:
    while name in tied:
        name = tied[name]
    return name
