"""What adapters do to one tensor of the base: a list of edits, and the tensor they make of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export.merge.experts import with_experts
from launcher.export.merge.lora import Delta, WithLora
from launcher.export.merge.rows import BiasSum, Replaced, TokenRows
from launcher.export.tensor import Tensor
from launcher.export.tensor.tiles import spans


@dataclass(frozen=True, eq=False)
class Replace:
    values: Tensor
    shared: bool  # written into the base's own parameter, which a tied module shares


@dataclass(frozen=True, eq=False)
class Low:
    """LoRA on a matrix."""

    delta: Delta
    turned: bool
    delta_first: bool


@dataclass(frozen=True, eq=False)
class Experts:
    """LoRA on fused experts, a delta for each."""

    deltas: tuple[Delta, ...]
    turned: bool


@dataclass(frozen=True, eq=False)
class Addend:
    values: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Tokens:
    values: Tensor
    indices: tuple[int, ...]


COMPUTED = (torch.bfloat16, torch.float16, torch.float32)
Edit = Replace | Low | Experts | Addend | Tokens


def apply(base: Tensor, edits: list[Edit], device: str) -> tuple[Tensor, str]:
    """The edited tensor, in the base's dtype, and what was done to it.

    Edits of one kind may come from several adapters; those that do not commute are refused.
    """
    replaced = [edit for edit in edits if isinstance(edit, Replace)]
    low = [edit for edit in edits if isinstance(edit, Low)]
    experts = [edit for edit in edits if isinstance(edit, Experts)]
    addends = [edit for edit in edits if isinstance(edit, Addend)]
    tokens = [edit for edit in edits if isinstance(edit, Tokens)]
    _check_together(base.name, len(replaced), low, tokens)
    if (low or experts or addends) and base.dtype not in COMPUTED:
        raise UserError(
            f"{base.name} is {str(base.dtype).removeprefix('torch.')}, to which nothing can be "
            "added; dequantise the base to bf16 first"
        )
    tensor, actions = base, []
    for edit in replaced:
        values = edit.values
        tensor = Replaced(base.name, base.dtype, values.shape, values)
        actions.append("replaced")
    if low:
        deltas = tuple(edit.delta for edit in low)
        first = any(edit.delta_first for edit in low)
        tensor = WithLora(
            base.name, base.dtype, tensor.shape, tensor, deltas, low[0].turned, first, device
        )
        actions.append("merged (LoRA)" if deltas[0].magnitude is None else "merged (DoRA)")
    if experts:
        tensor = with_experts(tensor, [edit.deltas for edit in experts], experts[0].turned, device)
        actions.append("merged (LoRA on experts)")
    if addends:
        pairs = tuple((edit.values, edit.scale) for edit in addends)
        tensor = BiasSum(base.name, base.dtype, tensor.shape, tensor, pairs)
        actions.append("merged (LoRA bias)")
    for rows in tokens:
        tensor = TokenRows(base.name, base.dtype, tensor.shape, tensor, rows.values, rows.indices)
        actions.append(f"{len(rows.indices)} tokens replaced")
    return tensor, ", ".join(actions)


def same_values(one: Tensor, other: Tensor, transposed: bool = False) -> bool:
    """Whether two tensors hold the same values; a span of rows at a time."""
    if transposed:
        return torch.equal(one.whole().float().T, other.whole().float())
    if one is other or one.shape != other.shape:
        return one is other
    return all(
        torch.equal(one.read(top, bottom).float(), other.read(top, bottom).float())
        for top, bottom in spans(one.rows, one.columns)
    )


def check_finite(tensor: Tensor, origin: Path) -> None:
    for top, bottom in spans(tensor.rows, tensor.columns):
        if not bool(torch.isfinite(tensor.read(top, bottom)).all()):
            raise UserError(
                f"{origin}: {tensor.name} holds NaN or infinite values; the training diverged, so "
                "take an earlier checkpoint"
            )


def _check_together(name: str, replaced: int, low: list[Low], tokens: list[Tokens]) -> None:
    problem = None
    indices = [index for edit in tokens for index in edit.indices]
    if replaced > 1:
        problem = "more than one adapter replaces it"
    elif len(low) > 1 and any(edit.delta.magnitude is not None for edit in low):
        problem = "DoRA and another adapter change it, and DoRA does not add up"
    elif low and tokens:
        problem = "both LoRA and trainable tokens change it"
    elif len(indices) != len(set(indices)):
        problem = "the trainable tokens name a row twice"
    if problem:
        raise UserError(f"{name}: {problem}; merge the adapters one after the other")
