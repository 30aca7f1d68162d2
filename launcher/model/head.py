"""The loss without the logits: the output head sums the cross-entropy itself, chunk by chunk.

Logits [rows, length, vocabulary] in fp32, with softmax and gradient, can need more memory than all
layers together. Here there is one chunk of them at a time, and only for positions that have a
target; gradients are computed in the forward, beside the loss, as in Liger's fused loss
(https://arxiv.org/abs/2410.10989).

The head stays the model's own module, of another class: names, ties and the hooks by which
strategies gather its weight stay as they are. It returns the summed loss where the model expects
logits, and the model hands it through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from launcher.model.peft import PeftModel

CHUNK_ELEMENTS = 2**25  # logits of a chunk; in fp32 128 MiB
NONE = -1  # what Liger is told that a position without a target has

Needs = tuple[bool, bool, bool]  # gradients of hidden, weight and bias
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Targets:
    """What a forward is to predict."""

    at: torch.Tensor  # [n] int64: positions in the flattened [rows, length]
    ids: torch.Tensor  # [n] int64: the token to predict there; negative: none
    shape: torch.Size  # [rows, length]
    smoothing: float


_targets: ContextVar[Targets | None] = ContextVar("targets", default=None)


@contextmanager
def predicting(targets: Targets) -> Iterator[None]:
    """A chunked head returns, meanwhile, the summed loss of `targets` in place of logits."""
    token = _targets.set(targets)
    try:
        yield
    finally:
        _targets.reset(token)


class ChunkedHead(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary]; while predicting, 0-d fp32: the summed loss."""
        targets = _targets.get()
        if targets is None:
            return super().forward(hidden)
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"the head was handed {list(hidden.shape)}, and not the positions of "
                f"{list(targets.shape)}; training.loss=whole"
            )
        return self._sum(hidden.flatten(0, 1).index_select(0, targets.at), targets)

    def _sum(self, chosen: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The loss of chosen [n, width], the hidden states that have a target."""
        graph = torch.is_grad_enabled()  # inside a Function it never is
        loss: torch.Tensor = _SummedLoss.apply(
            chosen, self.weight, self.bias, targets, chunk_rows(self.weight), graph
        )
        return loss


class LigerHead(ChunkedHead):
    """The same by Liger's Triton kernel, in chunks of its own. The gradients are those before any
    loss scale, also in fp16."""

    def _sum(self, chosen: torch.Tensor, targets: Targets) -> torch.Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Fused,
        )

        own = (parameter.requires_grad for parameter in self.parameters())
        if torch.is_grad_enabled() and any(own):
            # It computes gradients, those of the weight too, only where this one needs its own.
            chosen.requires_grad_()
        ids = targets.ids.clamp(min=NONE)
        smoothing, softcap, z_loss = targets.smoothing, None, False
        loss: torch.Tensor = Fused.apply(
            *(chosen, self.weight, ids, self.bias, None, NONE, 0.0, smoothing, "sum"),
            *(softcap, z_loss, torch.float32),  # the dtype in which chunks are summed
        )[0]
        return loss


def chunk_rows(weight: torch.Tensor) -> int:
    """Positions of a chunk: a power of two. More where the weight is trained, for every chunk adds
    to a gradient as large as the weight."""
    elements = CHUNK_ELEMENTS * (4 if weight.requires_grad else 1)
    rows = max(1, elements // weight.shape[0])
    return min(max(1 << (rows.bit_length() - 1), 64), 4096)


def chunk_loss(model: nn.Module, choice: str) -> str:
    """Have the head of `model` sum the loss, by `training.loss`; what is done in words.

    A head that is no plain linear layer, and a model that changes logits after its head, keep
    whole logits. Call it after the method, which may wrap the head, and before the strategy.
    """
    if choice == "whole":
        return "whole logits, because training.loss=whole"
    head = model.get_output_embeddings()  # type: ignore[operator]
    if reason := _unfit(model, head):
        return f"whole logits, because {reason}"
    if choice == "liger":
        head.__class__ = LigerHead
        return f"by Liger {metadata.version('liger-kernel')}, in chunks of its own"
    head.__class__ = ChunkedHead
    return f"in chunks of {chunk_rows(head.weight)} positions"


def _unfit(model: nn.Module, head: nn.Module) -> str | None:
    """Why the head cannot sum the loss, found out by a forward without the layers: what comes out
    of the head must come out of the model as it is."""
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if bare.base_model is bare:
        return f"{type(bare).__name__} does not say which of its modules computes hidden states"
    hidden, returned, given = torch.zeros(1, 2, head.in_features), torch.zeros(()), []

    def stand_in(handed: torch.Tensor) -> torch.Tensor:
        given.append(handed.shape)
        return returned

    with (
        torch.no_grad(),
        _forward_of(bare.base_model, lambda *_, **__: _Hidden(hidden)),
        _forward_of(head, stand_in),
    ):
        try:
            found = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
        except Exception as error:  # what slices or splits logits fails in a way of its own
            return f"{type(bare).__name__} wants more of them ({type(error).__name__}: {error})"
    if given != [hidden.shape]:
        return f"{type(bare).__name__} calls its head {len(given)} times, with {given}"
    if found is not returned or returned._version:
        return f"{type(bare).__name__} changes what its head returns"
    return None


class _Hidden:
    """In place of what the layers return: hidden states, and nothing else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")  # an instance's own, if it has one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _SummedLoss(torch.autograd.Function):
    """Gradients are computed in the forward, before the loss is divided or scaled, and multiplied
    in backward. In fp16 small ones would be lost by then: there backward computes all again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: Targets,
        rows: int,
        graph: bool,
    ) -> torch.Tensor:
        ctx.needs = tuple(needed and graph for needed in ctx.needs_input_grad[:3])
        ctx.again = hidden.dtype == torch.float16
        if ctx.again:
            # The parameter itself, which strategies free and gather again.
            ctx.save_for_backward(hidden, weight, bias)
            ctx.rest = (targets, rows)
            return _summed(hidden, weight, bias, targets, rows, (False, False, False))[0]
        loss, gradients = _summed(hidden, weight, bias, targets, rows, ctx.needs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.again:
            (hidden, weight, bias), (targets, rows) = ctx.saved_tensors, ctx.rest
            _, again = _summed(hidden, weight, bias, targets, rows, ctx.needs, scale)
            return (*again, None, None, None)
        # 1-d: a 0-d factor would be rounded to the gradient's dtype first.
        scaled = [g if g is None else g.mul_(scale.view(1)) for g in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _summed(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Targets,
    rows: int,
    needs: Needs,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Gradients]:
    """The loss of hidden [n, width] (0-d fp32), and those of its gradients that are needed, in the
    dtypes of what they belong to and multiplied by `scale` before they are rounded to them."""
    chunks = range(0, len(hidden), rows)
    of_hidden = torch.empty_like(hidden) if needs[0] else None
    # One chunk is rounded once, by the multiplication; several are summed in fp32.
    dtype = torch.float32 if len(chunks) > 1 else weight.dtype
    of_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
    losses = []
    for begin in chunks:
        part = slice(begin, begin + rows)
        ids = targets.ids[part]
        chances = _log_chances(hidden[part], weight, bias)
        losses.append(_cross_entropy(chances, ids, targets.smoothing))
        if not any(needs):
            continue
        of_logits = _of_logits(chances, ids, targets.smoothing, scale)
        rounded, real = of_logits.to(weight.dtype), (ids >= 0).unsqueeze(1)
        if of_hidden is not None:
            of_hidden[part] = torch.where(real, rounded @ weight, 0)
        if of_weight is not None:
            learnt = torch.where(real, hidden[part], 0)
            _add_product(of_weight, rounded.T, learnt)
        if of_bias is not None:
            of_bias += torch.where(real, of_logits, 0).sum(0)
    gradients = (
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )
    return torch.stack(losses).sum(), gradients


def _log_chances(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[n, vocabulary] fp32. The logits are freed here."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    return torch.log_softmax(logits, dim=1, dtype=torch.float32)


def _cross_entropy(chances: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
    """0-d: the sum over positions with a target."""
    each = chances.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    if smoothing:
        each = (1 - smoothing) * each + smoothing * chances.mean(dim=1)
    return -torch.where(ids >= 0, each, 0).sum()


def _of_logits(
    chances: torch.Tensor, ids: torch.Tensor, smoothing: float, scale: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of the logits, in place of their log-chances; where there is no target it is
    not that of the loss, which is zero."""
    gradient = chances.exp_()
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    share = gradient.new_full((len(ids), 1), smoothing - 1)
    gradient.scatter_add_(1, ids.clamp(min=0).unsqueeze(1), share)
    return gradient if scale is None else gradient.mul_(scale)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
