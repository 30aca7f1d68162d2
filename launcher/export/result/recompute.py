"""A second opinion: tiles of every written tensor, computed again by `exact`, the slow way."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export.plan import Plan
from launcher.export.readers.safetensors_file import read_header
from launcher.export.tensor import Tensor

ROWS = 4


def recompute(plan: Plan, folder: Path) -> int:
    """Compare ROWS random rows of every tensor in `folder` with the plan's; how many tensors.

    Which rows, the plan's identity decides: a resumed export looks at the same. Raises UserError
    naming the tensor and the rows that differ by more than one unit in the last place of the
    dtype; a copied tensor may not differ at all.
    """
    seed = plan.identity()
    return sum(
        _compare_file(folder / plan.file_name(number), shard, plan, seed)
        for number, shard in enumerate(plan.shards)
    )


def _compare_file(path: Path, tensors: list[Tensor], plan: Plan, seed: str) -> int:
    written = read_header(path)
    if written.keys() != {tensor.name for tensor in tensors}:
        raise UserError(f"{path} does not hold the tensors that were planned for it")
    with torch.inference_mode():
        for tensor in tensors:
            exactly = plan.actions[tensor.name] == "copied"
            _compare(path, tensor, written[tensor.name], exactly, f"{seed}{tensor.name}")
    return len(tensors)


def _compare(path: Path, planned: Tensor, written: Tensor, exactly: bool, seed: str) -> None:
    if (written.dtype, written.shape) != (planned.dtype, planned.shape):
        raise UserError(f"{path}: {planned.name} is not of the shape and dtype planned")
    first = random.Random(seed).randrange(max(1, planned.rows - ROWS + 1))
    last = min(first + ROWS, planned.rows)
    expected, found = planned.exact(first, last), written.exact(first, last)
    if exactly or not planned.dtype.is_floating_point:
        wrong = (expected != found) & ~(expected.isnan() & found.isnan())
    else:
        wrong = _differing(expected, found, planned.dtype)
    if wrong.any():
        row = first + int(wrong.nonzero()[0, 0])
        raise UserError(
            f"{path}: row {row} of {planned.name} is not what a second computation gives "
            f"({int(wrong.sum())} of {wrong.numel()} values compared differ); the file or its "
            "source changed meanwhile, or this machine miscalculates"
        )


def _differing(expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where computed values [rows, columns] are not the expected ones, rounded to `dtype`.

    One unit in the last place may differ, and fp32's rounding of the row's largest value: the fast
    way adds in fp32. Where PEFT rounds a delta before adding it, one in a hundred may differ by a
    unit of the row's largest: the delta lay between two values.
    """
    info = torch.finfo(dtype)
    apart, largest = (found - expected).abs(), expected.abs().amax(dim=1, keepdim=True)
    near = expected.abs() * info.eps + largest * 2e-6 + info.smallest_normal * info.eps
    wrong = ~(apart <= near)
    if int(wrong.sum()) <= max(1, wrong.numel() // 100):
        return ~(apart <= near + largest * info.eps)
    return wrong
