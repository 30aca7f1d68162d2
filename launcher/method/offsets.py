"""Low-rank changes of the base that come before training, and how an adapter's folder holds them.

Where a run begins from W + C instead of the base's W (adapters merged first; PiSSA's residual,
https://arxiv.org/abs/2404.02948, C = −s·B₀A₀), the trained adapter s·BA belongs to that base. It is
saved as s·BA + C, a plain LoRA of larger rank: [B | C's left] [A ; C's right]. So the folder always
fits the original base, as with PEFT's path_initial_model_for_weight_conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.errors import UserError
from launcher.model.load import Slot, Weights
from launcher.model.stored import Sum, read_whole


@dataclass(frozen=True)
class LowRank:
    """left [out, r] @ right [r, in], fp32 on CPU."""

    left: torch.Tensor
    right: torch.Tensor

    def beside(self, other: LowRank) -> LowRank:
        """The sum of both."""
        left = torch.cat([self.left, other.left], dim=1)
        return LowRank(left, torch.cat([self.right, other.right]))

    def product(self) -> torch.Tensor:
        return self.left @ self.right


class Base:
    """The base's matrices [out, in] by module: one at a time in memory, however they are stored."""

    def __init__(self, weights: Weights | None) -> None:
        self._weights = weights
        self._slots = weights.by_parameter() if weights else {}

    def matrix(self, module: nn.Module) -> torch.Tensor:
        """fp32, whole, with all that was added."""
        weight = module.get_parameter("weight")
        stored = read_whole(self._slots[id(weight)].stored) if weight.is_meta else weight.detach()
        whole = stored.float()
        return whole.T if _is_turned(module) else whole

    @torch.no_grad()
    def add(self, module: nn.Module, change: LowRank) -> None:
        left, right = change.left, change.right
        if _is_turned(module):
            left, right = right.T.contiguous(), left.T.contiguous()
        weight = module.get_parameter("weight")
        if weight.is_meta:
            slot = self._slots[id(weight)]
            slot.stored = Sum(slot.stored, left, right)
        else:
            weight.copy_(weight.float() + left @ right)

    def copies(self, original: nn.Module, copy: nn.Module) -> None:
        """`copy` will be filled with what `original` is filled with."""
        if self._weights is None:
            return
        for attribute, parameter in original.named_parameters():
            module, _, leaf = attribute.rpartition(".")
            stored = self._slots[id(parameter)].stored
            self._weights.slots.append(Slot(copy.get_submodule(module), leaf, stored))


def _is_turned(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def principal(matrix: torch.Tensor, rank: int, iterations: int | None) -> LowRank:
    """The `rank` largest singular directions of `matrix`, the singular values dealt in equal parts
    (their roots) to both sides. `iterations`: of a randomised method (torch.svd_lowrank); None:
    exact. Draws from torch's generator."""
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, turned = torch.svd_lowrank(matrix, rank, niter=iterations)
        right = turned.T
    roots = values[:rank].sqrt()
    return LowRank(left[:, :rank] * roots, roots[:, None] * right[:rank])


def joined(
    trained: dict[str, tuple[LowRank, float]], offsets: dict[str, LowRank]
) -> dict[str, tuple[LowRank, float]]:
    """The plain LoRA of each module (factors, scale) that is trained adapter plus offset."""
    result = dict(trained)
    for module, offset in offsets.items():
        if module not in trained:
            result[module] = offset, 1.0
            continue
        factors, scale = trained[module]
        result[module] = factors.beside(LowRank(offset.left / scale, offset.right)), scale
    return result


def settings_of(found: dict[str, tuple[LowRank, float]]) -> dict[str, Any]:
    """Rank, alpha and patterns for adapter_config.json, such that alpha / rank is the scale."""
    shapes = {
        module: (len(low.right), scale * len(low.right)) for module, (low, scale) in found.items()
    }
    every = list(shapes.values())
    rank, alpha = max(every, key=every.count)
    apart = {module: shape for module, shape in shapes.items() if shape != (rank, alpha)}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: shape[0] for module, shape in apart.items()},
        "alpha_pattern": {module: shape[1] for module, shape in apart.items()},
        "use_rslora": False,
    }


def check_same(module: str, stored: LowRank, own: LowRank) -> None:
    """Raises UserError when a checkpoint was trained on another changed base than this run's.

    Where another machine decomposes, the last bits differ: they do no harm.
    """
    before, now = stored.product(), own.product()
    if not torch.allclose(before, now, rtol=1e-3, atol=1e-4 * float(now.abs().max())):
        raise UserError(
            f"the checkpoint's {module} was trained on a base that was changed otherwise (PiSSA or "
            "merge_first gave other values here); consolidate it and begin anew from the result"
        )
