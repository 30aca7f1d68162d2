"""Reads a DeepSpeed ZeRO checkpoint as a model.

Stages 1 and 2 save the complete working weights. Their master weights, and everything in stage 3,
are flat vectors that are sharded over the ranks (deepspeed.utils.zero_to_fp32). Stages 1 and 2 give
each rank one range of each parameter group's vector. Stage 3 gives each rank ⌈elements / ranks⌉
elements of each parameter. `param_slice_mappings` is not used: it is wrong under
round_robin_gradients.
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
from launcher.folders.brief import brief
from launcher.io.readers.found import FoundModel
from launcher.io.readers.model_folder import find_aliases
from launcher.io.readers.torch_file import tensors_in
from launcher.io.readers.unpickle import is_shape
from launcher.io.readers.unpickler import named_damage
from launcher.io.readers.wrapper_prefixes import skipped_note, stripped_names
from launcher.io.readers.zero_files import (
    Shape,
    ZeroCheckpoint,
    read_checkpoint,
    shapes_of,
    tag_folder,
)
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Piece, Stored, run_pieces

NO_FROZEN = "the checkpoint was saved without its frozen parameters (exclude_frozen_parameters)"


def read_model(folder: Path, tag: str | None = None, masters: bool = False) -> FoundModel:
    """The weights in the dtype that training computed in, or, with `masters`, the optimizer's
    master weights.

    `tag`: which checkpoint in `folder`; default: the one that `latest` names. Raises UserError if
    files are missing, stale or damaged, or if the model itself was split over ranks.
    """
    with named_damage(folder, "ZeRO checkpoint"):
        checkpoint = read_checkpoint(tag_folder(folder, tag))
        if checkpoint.stage3:
            tensors = _stage3_tensors(checkpoint, masters)
        else:
            tensors = _stage12_tensors(checkpoint, masters)
        state = checkpoint.model_states[0]
        return build_found_model(checkpoint.folder, tensors, state, _notes(checkpoint))


def build_found_model(
    folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], notes: tuple[str, ...] = ()
) -> FoundModel:
    """The tensors under names without wrappers, and each tied tensor once: `shared_params` and
    shared storages show which are tied."""
    tied = {k: v for k, v in (state.get("shared_params") or {}).items() if v in tensors}
    tied = {**find_aliases({k: v for k, v in tensors.items() if k not in tied}), **tied}
    for name in tied:
        _follow_aliases(folder, tied, name)
    unique = {name: tensor for name, tensor in tensors.items() if name not in tied}
    short = stripped_names([*unique, *tied], folder)
    trained = {name for group in param_shapes(state) for name in group}
    return FoundModel(
        {
            short[name]: tensor.renamed(short[name])
            for name, tensor in unique.items()
            if name in short
        },
        {short[name]: short[_follow_aliases(folder, tied, name)] for name in tied if name in short},
        notes,
        frozenset(short[name] for name in trained if name in short),
    )


def in_compute_dtype(
    folder: Path, state: dict[str, Any], masters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The master weights of stage 3, each in the dtype of its parameter in training: that of the
    empty tensor that `module` has in its place. The model may be in bf16 and its adapter in
    fp32."""
    general = _compute_dtype(state)
    empty, _ = tensors_in(state["module"], folder)
    dtypes = {name: empty[name].dtype if name in empty else general for name in masters}
    return {name: tensor.to(dtypes[name] or tensor.dtype) for name, tensor in masters.items()}


def _compute_dtype(state: dict[str, Any]) -> torch.dtype | None:
    """The dtype that training computed in; None if it is the dtype of the masters."""
    config = state.get("ds_config")
    config = config if isinstance(config, dict) else {}
    for section, dtype in (
        ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)
    ):  # fmt: skip
        if (config.get(section) or {}).get("enabled") is True:
            return dtype
    return None


def param_shapes(state: dict[str, Any]) -> list[dict[str, Shape]]:
    """Name → shape of the trained parameters: one dict for each parameter group, in the order of
    its flat vector."""
    return [shapes_of("param_shapes", group) for group in state.get("param_shapes") or []]


def frozen_parameters(folder: Path, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The frozen parameters of stage 3, gathered from the fragments of all ranks."""
    result: dict[str, Tensor] = {}
    frozen = shapes_of("frozen_param_shapes", states[0].get("frozen_param_shapes") or {})
    for name, shape in frozen.items():
        fragments = [
            _FlatVector.from_parts(folder, [state["frozen_param_fragments"][name]])
            for state in states
        ]
        result[name] = _gather_parameter(folder, name, shape, fragments, 0)
    return result


def persistent_buffers(folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The persistent buffers of stage 3. The other tensors in `module` are empty."""
    module, _ = tensors_in(state["module"], folder)
    return {name: module[name] for name in state.get("buffer_names") or () if name in module}


@dataclass(frozen=True)
class _FlatVector:
    """A flat vector that is stored in several pieces."""

    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    begins: tuple[int, ...]  # the first element of each piece
    count: int

    @staticmethod
    def from_parts(folder: Path, parts: Sequence[Any]) -> _FlatVector:
        """Stored vectors, concatenated. Raises UserError if their dtypes differ."""
        dtypes = {part.dtype for part in parts}
        if len(dtypes) > 1 or not all(isinstance(part, Stored) for part in parts):
            raise UserError(f"{folder}: its flat groups are of {sorted(map(str, dtypes))}")
        pieces = tuple(piece for part in parts for piece in part.pieces)
        ends = list(itertools.accumulate((piece.size for piece in pieces), initial=0))
        dtype = dtypes.pop() if dtypes else torch.float32
        return _FlatVector(dtype, pieces, tuple(ends[:-1]), ends[-1])

    def ranges(self, begin: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """(file, byte offset, elements) of the file ranges that make up [begin, begin + count)."""
        index = bisect.bisect_right(self.begins, begin) - 1
        while count:
            inside = begin - self.begins[index]
            size = min(count, self.pieces[index].size - inside)
            offset = self.pieces[index].begin + inside * self.dtype.itemsize
            yield self.pieces[index].file, offset, size
            index, begin, count = index + 1, begin + size, count - size


def _stage12_tensors(checkpoint: ZeroCheckpoint, masters: bool) -> dict[str, Tensor]:
    module, _ = tensors_in(checkpoint.model_states[0]["module"], checkpoint.folder)
    if not masters:
        return module
    if not checkpoint.optimizer_states:
        raise UserError(
            f"{checkpoint.folder} contains no *_optim_states.pt, and so no master weights"
        )
    return module | dict(_stage12_masters(checkpoint))


def _stage12_masters(checkpoint: ZeroCheckpoint) -> Iterator[tuple[str, Tensor]]:
    groups = param_shapes(checkpoint.model_states[0])
    rank_vectors = _flat_vectors(checkpoint, "single_partition_of_fp32_groups", len(groups))
    paddings = checkpoint.optimizer_states[0].get("param_alignment_paddings")
    paddings = paddings or [[0] * len(group) for group in groups]
    if not all(map(is_shape, paddings)):
        raise ValueError(f"param_alignment_paddings are {brief(paddings)}")
    for number, shapes in enumerate(groups):
        parts = [vectors[number] for vectors in rank_vectors]
        vector = _FlatVector.from_parts(checkpoint.folder, parts)
        padding = paddings[number]
        counts = [math.prod(shape) for shape in shapes.values()]
        padded = map(sum, zip(counts, padding, strict=True))
        begins = list(itertools.accumulate(padded, initial=0))
        _check_length(checkpoint, vector.count, begins, counts)
        for (name, shape), begin, count in zip(shapes.items(), begins, counts, strict=False):
            pieces: list[Piece] = []
            at = 0
            for file, offset, size in vector.ranges(begin, count):
                pieces += run_pieces(file, offset, at, size, shape, vector.dtype.itemsize)
                at += size
            yield name, Stored(name, vector.dtype, shape, tuple(pieces))


def _flat_vectors(checkpoint: ZeroCheckpoint, key: str, count: int) -> list[list[Any]]:
    """Each rank's list of flat vectors, one for each parameter group. Raises UserError if their
    number is wrong."""
    vectors = [state.get(key) for state in checkpoint.optimizer_states]
    for rank, groups in enumerate(vectors):
        if not isinstance(groups, list) or len(groups) != count:
            number = len(groups) if isinstance(groups, list) else "no"
            raise UserError(
                f"{checkpoint.folder}: the optim_states of rank {rank} contain {number} {key}, and "
                f"{count} groups were trained: it is damaged or from another save"
            )
    return [list(groups) for groups in vectors if groups is not None]


def _check_length(
    checkpoint: ZeroCheckpoint, length: int, begins: list[int], counts: list[int]
) -> None:
    """The vector must contain all parameters, and beyond them at most its own padding."""
    needed = begins[-2] + counts[-1] if counts else 0
    unit = 2 * checkpoint.world_size  # DeepSpeed pads the vector to a multiple of this
    if not needed <= length <= -(-begins[-1] // unit) * unit:
        raise _length_error(checkpoint.folder, length, needed)


def _stage3_tensors(checkpoint: ZeroCheckpoint, masters: bool) -> dict[str, Tensor]:
    folder, state = checkpoint.folder, checkpoint.model_states[0]
    groups = param_shapes(state)
    rank_vectors = _flat_vectors(checkpoint, "fp32_flat_groups", len(groups))
    vectors = [_FlatVector.from_parts(folder, parts) for parts in rank_vectors]
    tensors: dict[str, Tensor] = {}
    at = 0
    for shapes in groups:
        for name, shape in shapes.items():
            tensors[name] = _gather_parameter(folder, name, shape, vectors, at)
            at += -(-math.prod(shape) // checkpoint.world_size)
    for vector in vectors:
        if vector.count != at:
            raise _length_error(folder, vector.count, at)
    if not masters:
        tensors = in_compute_dtype(folder, state, tensors)
    frozen = frozen_parameters(folder, checkpoint.model_states)
    return tensors | frozen | persistent_buffers(folder, state)


def _gather_parameter(
    folder: Path, name: str, shape: Shape, vectors: Sequence[_FlatVector], at: int
) -> Stored:
    """A parameter of stage 3. Each rank has the same number of its elements, from element `at` of
    the rank's vector."""
    total = math.prod(shape)
    per_rank = -(-total // len(vectors))
    pieces: list[Piece] = []
    for rank, vector in enumerate(vectors):
        begin = min(rank * per_rank, total)
        count = min(per_rank, total - begin)
        if vector.count < at + count:
            raise _length_error(folder, vector.count, at + count)
        for file, offset, size in vector.ranges(at, count):
            pieces += run_pieces(file, offset, begin, size, shape, vector.dtype.itemsize)
            begin += size
    return Stored(name, vectors[0].dtype, shape, tuple(pieces))


def _length_error(folder: Path, actual: int, needed: int) -> UserError:
    if actual == 0:
        reason = "they were offloaded to NVMe, and cannot be read"
    else:
        reason = "the checkpoint is damaged or mixes two saves"
    return UserError(
        f"{folder}: the flat groups of a rank contain {actual} elements, but the parameters need "
        f"{needed}: {reason}"
    )


def _notes(checkpoint: ZeroCheckpoint) -> tuple[str, ...]:
    """Notes on skipped entries and on missing frozen parameters. Stage 1 never lists frozen
    parameters. Later stages list them unless they were left out."""
    state = checkpoint.model_states[0]
    _, other_names = tensors_in(state["module"], checkpoint.folder)
    optimizers = checkpoint.optimizer_states
    stage = optimizers[0].get("zero_stage") if optimizers else None
    missing = stage in (2, 3) and state.get("frozen_param_shapes") is None
    return (*skipped_note(other_names, "that are not tensors"), *((NO_FROZEN,) if missing else ()))


def _follow_aliases(folder: Path, tied: dict[str, str], name: str) -> str:
    seen = {name}
    while name in tied:
        name = tied[name]
        if name in seen:
            raise UserError(f"{folder} is damaged: {name} is tied to itself")
        seen.add(name)
    return name
