"""Computes random rows of every written tensor a second time, by the slow `Tensor.reference`."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export.plan import Plan
from launcher.io.readers.safetensors_file import read_header
from launcher.io.tensor import Tensor

ROWS = 4


def recompute(plan: Plan, folder: Path) -> int:
    """Compare ROWS random rows of every tensor in `folder` with the plan. Returns the number of
    tensors. Raises UserError as `recompute_file` does."""
    seed, names = plan.identity(), map(plan.file_name, range(len(plan.shards)))
    return sum(recompute_file(plan, folder, name, seed) for name in names)


def recompute_file(plan: Plan, folder: Path, name: str, seed: str) -> int:
    """Compare ROWS random rows of every tensor in the file `name` with the plan. Returns the
    number of tensors.

    `seed`: the plan's identity, so that a resumed export checks the same rows. Raises UserError
    with the tensor and the row if a value differs by more than one unit in the last place of the
    dtype. A copied tensor may not differ at all.
    """
    path, tensors = folder / name, plan.files[name]
    written = read_header(path)
    if written.keys() != {tensor.name for tensor in tensors}:
        raise UserError(f"{path} does not contain the tensors that were planned for it")
    with torch.inference_mode():
        for tensor in tensors:
            is_copy = plan.actions[tensor.name] == "copied"
            _compare(path, tensor, written[tensor.name], is_copy, f"{seed}{tensor.name}")
    return len(tensors)


def _compare(path: Path, planned: Tensor, written: Tensor, is_copy: bool, seed: str) -> None:
    if (written.dtype, written.shape) != (planned.dtype, planned.shape):
        raise UserError(f"{path}: {planned.name} does not have the planned shape and dtype")
    first = random.Random(seed).randrange(max(1, planned.rows - ROWS + 1))
    last = min(first + ROWS, planned.rows)
    expected, actual = planned.reference(first, last), written.reference(first, last)
    if is_copy or not planned.dtype.is_floating_point:
        wrong = (expected != actual) & ~(expected.isnan() & actual.isnan())
    else:
        wrong = _differing(expected, actual, planned.dtype)
    if wrong.any():
        row = first + int(wrong.nonzero()[0, 0])
        raise UserError(
            f"{path}: row {row} of {planned.name} differs from a second computation "
            f"({int(wrong.sum())} of {wrong.numel()} compared values differ); the file or its "
            "source changed in the meantime, or this machine computes wrong results"
        )


def _differing(expected: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which computed values [rows, columns] are not the expected ones rounded to `dtype`.

    The tolerance is one unit in the last place, plus fp32's rounding error for the largest value of
    the row: the fast way adds in fp32. PEFT sometimes rounds a delta before adding it. A delta that
    is halfway between two values can then be rounded the other way, so one value in a hundred may
    differ by a unit of the row's largest value.
    """
    info = torch.finfo(dtype)
    difference, largest = (actual - expected).abs(), expected.abs().amax(dim=1, keepdim=True)
    tolerance = expected.abs() * info.eps + largest * 2e-6 + info.smallest_normal * info.eps
    wrong = ~(difference <= tolerance)
    if int(wrong.sum()) <= max(1, wrong.numel() // 100):
        return ~(difference <= tolerance + largest * info.eps)
    return wrong
