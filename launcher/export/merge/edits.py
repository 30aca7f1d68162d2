"""The changes that adapters make to one tensor of the base, and the tensor that results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export.merge.experts import with_experts
from launcher.export.merge.lora import Delta, WithLora
from launcher.export.merge.replacements import BiasSum, Replaced, TokenRows
from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import spans


@dataclass(frozen=True, eq=False)
class Replacement:
    """All values are replaced."""

    values: Tensor
    shared: bool  # written into the base's own parameter, which a tied module shares


@dataclass(frozen=True, eq=False)
class MatrixLora:
    """LoRA on a matrix. The last two fields are those of `WithLora`."""

    delta: Delta
    transposed: bool
    delta_first: bool


@dataclass(frozen=True, eq=False)
class ExpertLora:
    """LoRA on fused experts, one delta for each expert."""

    deltas: tuple[Delta, ...]
    transposed: bool


@dataclass(frozen=True, eq=False)
class BiasAddend:
    """`values` · `scale` is added to a bias."""

    values: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class TrainedTokens:
    """Row indices[k] is replaced by row k of `values`."""

    values: Tensor
    indices: tuple[int, ...]


COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Edit = Replacement | MatrixLora | ExpertLora | BiasAddend | TrainedTokens


def apply_edits(base: Tensor, edits: list[Edit], device: str) -> tuple[Tensor, str]:
    """(the edited tensor in the base's dtype, the actions that were applied).

    Several adapters may make edits of the same type. Raises UserError for edits whose order would
    matter.
    """
    replacements = [edit for edit in edits if isinstance(edit, Replacement)]
    matrices = [edit for edit in edits if isinstance(edit, MatrixLora)]
    experts = [edit for edit in edits if isinstance(edit, ExpertLora)]
    addends = [edit for edit in edits if isinstance(edit, BiasAddend)]
    tokens = [edit for edit in edits if isinstance(edit, TrainedTokens)]
    _check_combination(base.name, len(replacements), matrices, tokens)
    if (matrices or experts or addends) and base.dtype not in COMPUTE_DTYPES:
        raise UserError(
            f"{base.name} is {str(base.dtype).removeprefix('torch.')}, to which nothing can be "
            "added; dequantize the base to bf16 first"
        )
    tensor, actions = base, []
    for replacement in replacements:
        values = replacement.values
        tensor = Replaced(base.name, base.dtype, values.shape, values)
        actions.append("replaced")
    if matrices:
        deltas = tuple(edit.delta for edit in matrices)
        delta_first = any(edit.delta_first for edit in matrices)
        transposed = matrices[0].transposed
        tensor = WithLora(
            base.name, base.dtype, tensor.shape, tensor, deltas, transposed, delta_first, device
        )
        actions.append("merged (LoRA)" if deltas[0].magnitude is None else "merged (DoRA)")
    if experts:
        expert_deltas = [edit.deltas for edit in experts]
        tensor = with_experts(tensor, expert_deltas, experts[0].transposed, device)
        actions.append("merged (LoRA on experts)")
    if addends:
        pairs = tuple((edit.values, edit.scale) for edit in addends)
        tensor = BiasSum(base.name, base.dtype, tensor.shape, tensor, pairs)
        actions.append("merged (LoRA bias)")
    for rows in tokens:
        tensor = TokenRows(base.name, base.dtype, tensor.shape, tensor, rows.values, rows.indices)
        actions.append(f"{len(rows.indices)} tokens replaced")
    return tensor, ", ".join(actions)


def same_values(tensor: Tensor, other: Tensor, transposed: bool = False) -> bool:
    """Whether two tensors have equal values. Reads a span of rows at a time.

    `transposed`: compare with the transpose of `other`; this reads both completely.
    """
    if transposed:
        return torch.equal(tensor.read_all().float().T, other.read_all().float())
    if tensor is other or tensor.shape != other.shape:
        return tensor is other
    return all(
        torch.equal(tensor.read(top, bottom).float(), other.read(top, bottom).float())
        for top, bottom in spans(tensor.rows, tensor.columns)
    )


def check_finite(tensor: Tensor, origin: Path) -> None:
    """Raises UserError if the tensor contains a NaN or an infinity."""
    for top, bottom in spans(tensor.rows, tensor.columns):
        if not bool(torch.isfinite(tensor.read(top, bottom)).all()):
            raise UserError(
                f"{origin}: {tensor.name} contains NaN or infinite values; the training diverged, "
                "so use an earlier checkpoint"
            )


def _check_combination(
    name: str, replacements: int, matrices: list[MatrixLora], tokens: list[TrainedTokens]
) -> None:
    problem = None
    indices = [index for edit in tokens for index in edit.indices]
    if replacements > 1:
        problem = "more than one adapter replaces it"
    elif len(matrices) > 1 and any(edit.delta.magnitude is not None for edit in matrices):
        problem = "DoRA and another adapter change it, and DoRA does not add up"
    elif matrices and tokens:
        problem = "both LoRA and trainable tokens change it"
    elif len(indices) != len(set(indices)):
        problem = "the trainable tokens name a row twice"
    if problem:
        raise UserError(f"{name}: {problem}; merge the adapters one after the other")
