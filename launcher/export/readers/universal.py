"""DeepSpeed's universal checkpoint as a model: what `ds_to_universal` writes.

`zero/<name>/fp32.pt` is a master weight: a dict with its shape for stages 1 and 2, a flat vector
for stage 3. The `*_model_states.pt` that it was made from lie beside (deepspeed.checkpoint.
ds_to_universal). Under round_robin_gradients the conversion mixes parameters up without an error,
which the working weights beside it give away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.readers.found import Found
from launcher.export.readers.torch_file import read_file, tensors_in
from launcher.export.readers.zero import NO_FROZEN, buffers, frozen, live_dtype, named, shapes_of
from launcher.export.readers.zero_files import Grid, find_grid, tag_folder
from launcher.export.tensor import Tensor
from launcher.export.tensor.stored import Stored, run_pieces
from launcher.export.tensor.tiles import tiles

KIND = "DeepSpeed universal checkpoint"
POINTER = "latest_universal"
TILE = 8 << 20  # bytes


def recognises(folder: Path) -> bool:
    """Whether `folder` is one, or names one and no ZeRO checkpoint, which is the original."""
    named = (folder / POINTER).is_file() and not (folder / "latest").is_file()
    return (folder / "zero").is_dir() or named


def read_model(folder: Path, masters: bool = False) -> Found:
    """The weights in the dtype that they were trained in, or (`masters`) as fp32.pt has them.

    Reads everything once where working weights lie beside: raises UserError when they are not the
    masters rounded, and when files are missing or damaged.
    """
    if not (folder / "zero").is_dir():
        folder = tag_folder(folder, None, POINTER)
    grid = find_grid(folder, optimizers=False)
    state = grid.states[0]
    found = dict(_masters(grid))
    if grid.stage3:
        live = None if masters else live_dtype(state)
        tensors = {name: each.to(live) if live else each for name, each in found.items()}
        tensors |= frozen(folder, grid.states) | buffers(folder, state)
        whole = state.get("frozen_param_shapes") is not None
        return named(folder, tensors, state, () if whole else (NO_FROZEN,))
    module, _ = tensors_in(state["module"], folder)
    for name, master in found.items():
        if name not in module or module[name].shape != master.shape:
            raise UserError(f"{folder}: zero/{name} is of no weight of its *_model_states.pt")
        _check(folder, master, module[name])
    return named(folder, module | found if masters else module, state)


def _masters(grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that the optimizer stepped. Raises UserError when one has no file."""
    for shapes in shapes_of(grid.states[0]):
        for name, shape in shapes.items():
            file = grid.folder / "zero" / name / "fp32.pt"
            content = read_file(file)
            master = content.get("param") if isinstance(content, dict) else content
            yield name, _shaped(file, name, master, shape)


def _shaped(file: Path, name: str, master: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(master, Stored) or master.shape not in (shape, (math.prod(shape),)):
        what = list(master.shape) if isinstance(master, Tensor) else "no tensor"
        raise UserError(f"{file} holds {what}; {name} has the shape {list(shape)}")
    if not master.pieces:
        return Stored(name, master.dtype, shape, ())
    begin, width = master.pieces[0].begin, master.dtype.itemsize
    pieces = run_pieces(file, begin, 0, math.prod(shape), shape, width)
    return Stored(name, master.dtype, shape, tuple(pieces))


def _check(folder: Path, master: Tensor, live: Tensor) -> None:
    """Raises UserError unless the working weight is the master, rounded."""
    rounded = master.to(live.dtype)
    for first, last in tiles(live.rows, live.row_bytes, TILE):
        one, two = rounded.read(first, last), live.read(first, last)
        if not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            raise UserError(
                f"{folder}: zero/{live.name}/fp32.pt is not the weight that was trained and lies "
                "beside it: ds_to_universal mixes parameters up that were trained with "
                "round_robin_gradients; export the checkpoint that it was made from"
            )
