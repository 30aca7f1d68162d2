"""Low-rank changes of the base before training, and how an adapter folder contains them.

A run can start from W + C instead of the base's W: with adapters that are merged first, or with
PiSSA, where C = −s·B₀A₀ is the residual (https://arxiv.org/abs/2404.02948). C is the initial delta.
The trained adapter s·BA then belongs to the changed base. It is saved as s·BA + C, a plain LoRA of
a larger rank: [B | left factor of C] [A ; right factor of C]. The folder therefore always fits the
original base, as with PEFT's path_initial_model_for_weight_conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.errors import UserError
from launcher.io.weight_views import read_full
from launcher.model.lazy_weight import WeightSum
from launcher.model.load import Slot, Weights


@dataclass(frozen=True)
class LowRankDelta:
    """A change of a weight: left [out, r] @ right [r, in], fp32 on CPU."""

    left: torch.Tensor
    right: torch.Tensor

    def plus(self, other: LowRankDelta) -> LowRankDelta:
        """The sum of both, with the sum of their ranks."""
        left = torch.cat([self.left, other.left], dim=1)
        return LowRankDelta(left, torch.cat([self.right, other.right]))

    def product(self) -> torch.Tensor:
        """The full matrix, [out, in]."""
        return self.left @ self.right


# A module's path in the base → its LoRA factors and their scale.
ScaledDeltas = dict[str, tuple[LowRankDelta, float]]


class BaseWeights:
    """The matrices [out, in] of the base by module, one at a time in memory."""

    def __init__(self, weights: Weights | None) -> None:
        self._weights = weights
        self._slots = weights.by_parameter() if weights else {}

    def matrix(self, module: nn.Module) -> torch.Tensor:
        """The full weight in fp32, with the deltas that were added."""
        parameter = module.get_parameter("weight")
        if parameter.is_meta:
            full = read_full(self._slots[id(parameter)].source).float()
        else:
            full = parameter.detach().float()
        return full.T if _is_transposed(module) else full

    @torch.no_grad()
    def add(self, module: nn.Module, delta: LowRankDelta) -> None:
        """Add `delta` to the weight of `module`."""
        left, right = delta.left, delta.right
        if _is_transposed(module):
            left, right = right.T.contiguous(), left.T.contiguous()
        weight = module.get_parameter("weight")
        if weight.is_meta:
            slot = self._slots[id(weight)]
            slot.source = WeightSum(slot.source, left, right)
        else:
            weight.copy_(weight.float() + left @ right)

    def register_copy(self, original: nn.Module, copy: nn.Module) -> None:
        """Load `copy` from the same stored tensors as `original`."""
        if self._weights is None:
            return
        for path, parameter in original.named_parameters():
            module, _, attribute = path.rpartition(".")
            source = self._slots[id(parameter)].source
            self._weights.slots.append(Slot(copy.get_submodule(module), attribute, source))


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D"


def principal_delta(matrix: torch.Tensor, rank: int, iterations: int | None) -> LowRankDelta:
    """The `rank` largest singular directions of `matrix`. Each factor gets the square roots of the
    singular values.

    `iterations`: of the randomized method (torch.svd_lowrank), which draws from torch's generator;
    None: exact.
    """
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right_columns = torch.svd_lowrank(matrix, rank, niter=iterations)
        right = right_columns.T
    roots = values[:rank].sqrt()
    return LowRankDelta(left[:, :rank] * roots, roots[:, None] * right[:rank])


def add_initial_deltas(
    trained: ScaledDeltas, initial_deltas: dict[str, LowRankDelta]
) -> ScaledDeltas:
    """The plain LoRA of each module that is the trained adapter plus the initial delta."""
    result = dict(trained)
    for module, initial in initial_deltas.items():
        if module not in trained:
            result[module] = initial, 1.0
            continue
        delta, scale = trained[module]
        result[module] = delta.plus(LowRankDelta(initial.left / scale, initial.right)), scale
    return result


def rank_settings(deltas: ScaledDeltas) -> dict[str, Any]:
    """Rank, alpha and their patterns for adapter_config.json, so that alpha / rank is the scale."""
    shapes = {
        module: (len(delta.right), scale * len(delta.right))
        for module, (delta, scale) in deltas.items()
    }
    all_shapes = list(shapes.values())
    rank, alpha = max(all_shapes, key=all_shapes.count)
    exceptions = {module: shape for module, shape in shapes.items() if shape != (rank, alpha)}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: shape[0] for module, shape in exceptions.items()},
        "alpha_pattern": {module: shape[1] for module, shape in exceptions.items()},
        "use_rslora": False,
    }


def check_same_delta(module: str, saved: LowRankDelta, current: LowRankDelta) -> None:
    """Raises UserError if a checkpoint has another initial delta than this run.

    The last bits may differ: another machine computes the decomposition differently.
    """
    before, now = saved.product(), current.product()
    if not torch.allclose(before, now, rtol=1e-3, atol=1e-4 * float(now.abs().max())):
        raise UserError(
            f"the checkpoint's {module} was trained with a different initial delta (PiSSA or "
            "merge_first gave other values here); consolidate it and start again from the result"
        )
