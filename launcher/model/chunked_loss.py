"""The loss without all logits: the output head sums the cross-entropy itself, chunk by chunk.

Logits [rows, length, vocabulary] in fp32, with their softmax and gradient, can need more memory
than all layers. Here only one chunk of them exists at a time, and only for positions that have a
target. Gradients are computed in the forward, with the loss, as in Liger's fused loss
(https://arxiv.org/abs/2410.10989).

The head is still the model's own module, with another class: its names, its ties and the hooks by
which strategies gather its weight do not change. It returns the summed loss where the model expects
logits, and the model passes it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import nn

from launcher.model.head_probe import reason_for_whole_logits, transform_behind
from launcher.model.logit_transform import LogitTransform

CHUNK_ELEMENTS = 2**25  # logits of a chunk: 128 MiB in fp32
LIGER_IGNORE_INDEX = -1

NeedsGrad = tuple[bool, bool, bool]  # whether hidden, weight and bias need a gradient
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Targets:
    """The tokens that a forward is to predict."""

    positions: torch.Tensor  # [n] int64: positions in the flattened [rows, length]
    ids: torch.Tensor  # [n] int64: the token to predict there; negative: none
    shape: torch.Size  # [rows, length]
    smoothing: float
    # The loss, if the model will change what the head returns; token_loss takes it from here.
    passed_by: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Chunks:
    """How logits are computed."""

    rows: int  # positions of a chunk
    transform: LogitTransform | None = None


_targets: ContextVar[Targets | None] = ContextVar("targets", default=None)


@contextmanager
def loss_targets(targets: Targets) -> Iterator[None]:
    """Inside the context, a chunked head returns the summed loss of `targets` instead of logits."""
    token = _targets.set(targets)
    try:
        yield
    finally:
        _targets.reset(token)


class ChunkedCrossEntropyHead(nn.Linear):
    transform: LogitTransform | None = None  # what the model does with the logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary]; inside `loss_targets` the summed loss, 0-d fp32."""
        targets = _targets.get()
        if targets is None:
            return super().forward(hidden)
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"the head got hidden states of shape {list(hidden.shape)}, and not one for each "
                f"position of {list(targets.shape)}; training.loss=whole"
            )
        loss = self._sum_loss(hidden.flatten(0, 1).index_select(0, targets.positions), targets)
        if self.transform is not None:
            targets.passed_by.append(loss)
        return loss

    def _sum_loss(self, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The loss of hidden [n, width], the hidden states at `targets.positions`."""
        is_grad_enabled = torch.is_grad_enabled()  # always False inside a Function
        loss: torch.Tensor = _SummedLoss.apply(
            hidden, self.weight, self.bias, targets, self._chunks(), is_grad_enabled
        )
        return loss

    def _chunks(self) -> Chunks:
        return Chunks(chunk_rows(self.weight), self.transform)


class LigerHead(ChunkedCrossEntropyHead):
    """The same with Liger's Triton kernel, which chooses its own chunks. Its gradients are computed
    before any loss scale, also in fp16."""

    def _sum_loss(self, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Fused,
        )

        is_trained = any(parameter.requires_grad for parameter in self.parameters())
        if torch.is_grad_enabled() and is_trained:
            # Liger computes gradients, also that of the weight, only if `hidden` needs one.
            hidden.requires_grad_()
        ids = targets.ids.clamp(min=LIGER_IGNORE_INDEX)
        smoothing, softcap, z_loss = targets.smoothing, None, False
        loss: torch.Tensor = Fused.apply(
            *(hidden, self.weight, ids, self.bias, None, LIGER_IGNORE_INDEX, 0.0),
            *(smoothing, "sum", softcap, z_loss),
            torch.float32,  # the dtype in which chunks are summed
        )[0]
        return loss


def chunk_rows(weight: torch.Tensor) -> int:
    """Positions of a chunk, a power of two. More if the weight is trained, because every chunk adds
    to a gradient of the size of the weight."""
    elements = CHUNK_ELEMENTS * (4 if weight.requires_grad else 1)
    rows = max(1, elements // weight.shape[0])
    return min(max(1 << (rows.bit_length() - 1), 64), 4096)


def use_chunked_loss(model: nn.Module, choice: str) -> str:
    """Make the head of `model` sum the loss, by `training.loss`; returns a description for the log.

    The logits stay whole if the head is not a plain linear layer, or if the model changes logits
    behind the head by more than a factor and a soft cap. Call it after the method, which may wrap
    the head, and before the strategy.
    """
    if choice == "whole":
        return "whole logits, because training.loss=whole"
    head = model.get_output_embeddings()  # type: ignore[operator]
    transform = None
    if reason := reason_for_whole_logits(model, head):
        transform = None if choice == "liger" else transform_behind(model, head)
        if transform is None:
            return f"whole logits, because {reason}"
    if choice == "liger":
        head.__class__ = LigerHead
        return f"by Liger {metadata.version('liger-kernel')}, in its own chunks"
    head.__class__ = ChunkedCrossEntropyHead
    said = f"in chunks of {chunk_rows(head.weight)} positions"
    if transform is None:
        return said
    head.transform = transform
    return f"{said}, {transform}"


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients in the forward, before the loss is divided or scaled, and multiplies
    them in backward. In fp16, small gradients would underflow before that, so backward computes
    them again, with the scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: Targets,
        how: Chunks,
        is_grad_enabled: bool,
    ) -> torch.Tensor:
        ctx.needs = tuple(needed and is_grad_enabled for needed in ctx.needs_input_grad[:3])
        ctx.recomputes = hidden.dtype == torch.float16
        if ctx.recomputes:
            # Saves the parameter itself, which strategies free and gather again.
            ctx.save_for_backward(hidden, weight, bias)
            ctx.arguments = (targets, how)
            return _sum_chunks(hidden, weight, bias, targets, how, (False, False, False))[0]
        loss, gradients = _sum_chunks(hidden, weight, bias, targets, how, ctx.needs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.recomputes:
            (hidden, weight, bias), (targets, how) = ctx.saved_tensors, ctx.arguments
            _, gradients = _sum_chunks(hidden, weight, bias, targets, how, ctx.needs, scale)
            return (*gradients, None, None, None)
        # 1-d: a 0-d factor would be rounded to the gradient's dtype first.
        scaled = [g if g is None else g.mul_(scale.view(1)) for g in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _sum_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Targets,
    how: Chunks,
    needs: NeedsGrad,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Gradients]:
    """The loss of hidden [n, width] (0-d fp32), chunk by chunk, and the gradients that `needs`
    selects.

    Gradients have the dtypes of their tensors; they are multiplied by `scale` before they are
    rounded.
    """
    chunks = range(0, len(hidden), how.rows)
    hidden_grad = torch.empty_like(hidden) if needs[0] else None
    # The multiplication rounds a single chunk; several chunks are summed in fp32 first.
    dtype = torch.float32 if len(chunks) > 1 else weight.dtype
    weight_grad = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    bias_grad = None
    if bias is not None and needs[2]:
        bias_grad = torch.zeros_like(bias, dtype=torch.float32)
    losses = []
    for begin in chunks:
        part = slice(begin, begin + how.rows)
        ids = targets.ids[part]
        log_probs, slope = _log_probs(hidden[part], weight, bias, how.transform)
        losses.append(_cross_entropy(log_probs, ids, targets.smoothing))
        if not any(needs):
            continue
        logits_grad = _logits_grad(log_probs, ids, targets.smoothing, scale)
        if slope is not None:
            logits_grad *= slope
        rounded, has_target = logits_grad.to(weight.dtype), (ids >= 0).unsqueeze(1)
        if hidden_grad is not None:
            hidden_grad[part] = torch.where(has_target, rounded @ weight, 0)
        if weight_grad is not None:
            target_hidden = torch.where(has_target, hidden[part], 0)
            _add_product(weight_grad, rounded.T, target_hidden)
        if bias_grad is not None:
            bias_grad += torch.where(has_target, logits_grad, 0).sum(0)
    gradients = (
        hidden_grad,
        None if weight_grad is None else weight_grad.to(weight.dtype),
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )
    return torch.stack(losses).sum(), gradients


def _log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform | None,
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """[n, vocabulary] fp32, and the derivative of the transform at each logit, which is one number
    if it has no cap. The logits are freed on return."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    if transform is None:
        return torch.log_softmax(logits, dim=1, dtype=torch.float32), None
    logits = logits.float()
    slope = transform.apply_(logits)
    return torch.log_softmax(logits, dim=1), transform.scale if slope is None else slope


def _cross_entropy(log_probs: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The sum over positions with a target, 0-d."""
    target_log_probs = log_probs.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    if smoothing:
        smoothed = smoothing * log_probs.mean(dim=1)
        target_log_probs = (1 - smoothing) * target_log_probs + smoothed
    return -torch.where(ids >= 0, target_log_probs, 0).sum()


def _logits_grad(
    log_probs: torch.Tensor, ids: torch.Tensor, smoothing: float, scale: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of the logits, written over `log_probs`. Rows without a target are not zero, as
    the gradient of the loss is; the caller masks them."""
    gradient = log_probs.exp_()
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    target_share = gradient.new_full((len(ids), 1), smoothing - 1)
    gradient.scatter_add_(1, ids.clamp(min=0).unsqueeze(1), target_share)
    return gradient if scale is None else gradient.mul_(scale)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
