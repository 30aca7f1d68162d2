"""Reads DeepSpeed's universal checkpoint, which `ds_to_universal` writes, as a model.

`zero/<name>/fp32.pt` contains the master weights of a parameter: a dict with a tensor of the
parameter's shape for stages 1 and 2, a flat vector for stage 3. The `*_model_states.pt` of the
original checkpoint are in the same folder (deepspeed.checkpoint.ds_to_universal). If the run used
round_robin_gradients, the conversion mixes up parameters without an error. A comparison with the
working weights in `*_model_states.pt` detects this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders.brief import brief
from launcher.folders.kind import UNIVERSAL_POINTER
from launcher.folders.tensor_entries import is_inside
from launcher.io.readers.found import FoundModel
from launcher.io.readers.torch_file import read_file, tensors_in
from launcher.io.readers.unpickler import named_damage
from launcher.io.readers.zero import (
    NO_FROZEN,
    build_found_model,
    frozen_parameters,
    in_compute_dtype,
    param_shapes,
    persistent_buffers,
)
from launcher.io.readers.zero_files import ZeroCheckpoint, read_checkpoint, tag_folder
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Stored, run_pieces
from launcher.io.tensor.tiles import tiles

TILE_BYTES = 8 << 20


def read_model(folder: Path, masters: bool = False) -> FoundModel:
    """The weights in the dtype that training computed in, or, with `masters`, the fp32 masters.

    If the folder contains working weights, all of them are read once. Raises UserError if they
    are not the rounded masters, or if files are missing or damaged.
    """
    with named_damage(folder, "universal checkpoint"):
        return _read_model(folder, masters)


def _read_model(folder: Path, masters: bool) -> FoundModel:
    if not (folder / "zero").is_dir():
        folder = tag_folder(folder, None, UNIVERSAL_POINTER)
    checkpoint = read_checkpoint(folder, optimizers=False)
    state = checkpoint.model_states[0]
    found = dict(_masters(checkpoint))
    if checkpoint.stage3:
        tensors = found if masters else in_compute_dtype(folder, state, found)
        tensors |= frozen_parameters(folder, checkpoint.model_states)
        tensors |= persistent_buffers(folder, state)
        has_frozen = state.get("frozen_param_shapes") is not None
        return build_found_model(folder, tensors, state, () if has_frozen else (NO_FROZEN,))
    module, _ = tensors_in(state["module"], folder)
    for name, master in found.items():
        if name not in module or module[name].shape != master.shape:
            raise UserError(f"{folder}: zero/{name} does not match a weight in *_model_states.pt")
        _check_rounded(folder, master, module[name])
    return build_found_model(folder, module | found if masters else module, state)


def _masters(checkpoint: ZeroCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """The master weights of every trained parameter. Raises UserError if one has no file."""
    for shapes in param_shapes(checkpoint.model_states[0]):
        for name, shape in shapes.items():
            if not is_inside(name) or "\0" in name:
                raise ValueError(f"a parameter is named {brief(name)}")
            file = checkpoint.folder / "zero" / name / "fp32.pt"
            content = read_file(file)
            master = content.get("param") if isinstance(content, dict) else content
            yield name, _with_shape(file, name, master, shape)


def _with_shape(file: Path, name: str, master: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(master, Stored) or master.shape not in (shape, (math.prod(shape),)):
        content = list(master.shape) if isinstance(master, Tensor) else "no tensor"
        raise UserError(f"{file} contains {content}; {name} has the shape {list(shape)}")
    if not master.pieces:
        return Stored(name, master.dtype, shape, ())
    begin, width = master.pieces[0].begin, master.dtype.itemsize
    pieces = run_pieces(file, begin, 0, math.prod(shape), shape, width)
    return Stored(name, master.dtype, shape, tuple(pieces))


def _check_rounded(folder: Path, master: Tensor, working: Tensor) -> None:
    """Raises UserError unless the working weight is the rounded master."""
    rounded = master.to(working.dtype)
    for first, last in tiles(working.rows, working.row_bytes, TILE_BYTES):
        expected, actual = rounded.read(first, last), working.read(first, last)
        if not torch.equal(expected.view(torch.uint8), actual.view(torch.uint8)):
            raise UserError(
                f"{folder}: zero/{working.name}/fp32.pt does not match the trained weight in "
                "*_model_states.pt: ds_to_universal mixes up parameters that were trained with "
                "round_robin_gradients; export the checkpoint that it was made from"
            )
