"""LoRA of experts without their dense delta: y = Wₑx + s·Bₑ(Aₑx), by grouped matrix products.

PEFT adds s·BₑAₑ to the weights of all experts in every forward (tuners/lora/layer.py,
ParamWrapper): a copy of a whole stack in each layer. Here the tokens, sorted by expert, are
multiplied with A and B as transformers multiplies them with W (integrations/moe.py,
grouped_mm_experts_forward). PEFT's layers remain, of other classes, so saving, merging and loading
work as before. Each weight is used by its own module, once in a forward whatever the router
chooses, so the hooks that gather weights run in the same order on every rank; an expert without
tokens gets a gradient of zeros.

The inputs of A, one row for each pair of a token and an expert, are made again in backward from
what is stored anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import grouped_mm, pad
from transformers.integrations.moe import _grouped_mm

from launcher.io.adapter import ADAPTER_NAME
from launcher.model.peft import ParamWrapper, PeftModel
from launcher.model.sparse import is_grouped, unadaptable_experts

MULTIPLE = 8  # grouped products need ranks of 16 bytes: 8 elements of 16 bits
STACKS = ("gate_up_proj", "up_proj", "down_proj")

Remake = Callable[[torch.Tensor], torch.Tensor]  # source → the rows that were multiplied


def fuse_experts(model: nn.Module) -> str | None:
    """Change the classes of the adapted experts of `model`. Returns a description for the log if
    some experts are left to PEFT, or cannot have an adapter."""
    left: dict[str, None] = {}
    wrappers: list[Any] = [module for module in model.modules() if type(module) is ParamWrapper]
    for wrapper in wrappers:
        experts: Any = wrapper.get_base_layer()
        if wrapper.num_experts == 1:  # a router
            continue
        if not is_grouped(experts) or wrapper.parameter_name not in STACKS:
            left[type(experts).__name__] = None
            continue
        if not isinstance(experts, AdaptedExperts):
            experts.__class__ = _adapted(experts.__class__)
        wrapper.__class__ = FusedExpertLora
        for side, kind in (("lora_A", ExpertsA), ("lora_B", ExpertsB)):
            module = getattr(wrapper, side)[ADAPTER_NAME]
            module.__class__, module.experts = kind, wrapper.num_experts
    lines = []
    if left:
        lines.append(
            f"{', '.join(left)} compute in their own way, so the adapters of these experts are "
            "added to a copy of all their weights in each forward"
        )
    if isinstance(model, PeftModel) and (without := unadaptable_experts(model)):
        lines.append(
            f"{', '.join(without)} get no adapter, because their matrices are those of all experts "
            "in one → method=full or method=freeze trains them"
        )
    return "; ".join(lines) or None


class ExpertsA(nn.Linear):
    """A of all experts: weight [experts · rank, in], expert after expert."""

    experts: int

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, offsets: torch.Tensor, source: torch.Tensor, remake: Remake
    ) -> torch.Tensor:
        """x [n, in], sorted by expert → [n, padded rank]. x = remake(source) is not stored."""
        y: torch.Tensor = _ProductWithA.apply(
            x, self.weight, offsets, source.detach(), remake, self.experts
        )
        return y


class ExpertsB(nn.Linear):
    """B of all experts: weight [out, rank · experts], the expert as the fastest-running index."""

    experts: int

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x [n, padded rank], sorted by expert → [n, out]."""
        y: torch.Tensor = _ProductWithB.apply(x, self.weight, offsets, self.experts)
        return y


class FusedExpertLora(ParamWrapper):
    """PEFT's adapter of one stack. Special cases are left to PEFT's forward."""

    def forward(
        self,
        x: torch.Tensor,
        *args: Any,
        adapters: dict[str, FusedExpertLora] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`adapters`: those of other stacks of the same experts, by the stack's name."""
        chain = [self, *_inner(self)]
        if adapters is None and not all(layer.is_plain(x.dtype) for layer in chain):
            y: torch.Tensor = super().forward(x, *args, **kwargs)
            return y
        adapters = {**(adapters or {}), self.parameter_name: self}
        return self.base_layer(x, *args, adapters=adapters, **kwargs)  # type: ignore[no-any-return]

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the adapter is active, not merged, and of the dtype of its input."""
        if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER_NAME]:
            return False
        if set(self.lora_A) != {ADAPTER_NAME} or self.get_base_layer()._is_expert_parallel:
            return False
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return False  # torch compiles no other grouped products
        return bool(self.lora_A[ADAPTER_NAME].weight.dtype == dtype)

    def add_to(
        self, y: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, source: Any, remake: Remake
    ) -> torch.Tensor:
        """y [n, out] + s·B(Ax) for x [n, in] = remake(source), in place."""
        dropout = self.lora_dropout[ADAPTER_NAME]
        if self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            x = dropout(x)
            source, remake = x, _same
        inner = self.lora_A[ADAPTER_NAME](x, offsets, source, remake)
        return y.add_(
            self.lora_B[ADAPTER_NAME](inner * self.scaling[ADAPTER_NAME], offsets).to(y.dtype)
        )


def _inner(wrapper: FusedExpertLora) -> list[FusedExpertLora]:
    found = []
    layer = wrapper.base_layer
    while isinstance(layer, FusedExpertLora):
        found.append(layer)
        layer = layer.base_layer
    return found


def _same(source: torch.Tensor) -> torch.Tensor:
    return source


class AdaptedExperts:
    """Mixed into a class of experts: a forward that adds adapters."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: dict[str, FusedExpertLora] | None = None,
    ) -> torch.Tensor:
        """hidden_states [tokens, width]; top_k_… [tokens, k]: the experts of a token and their
        weights → [tokens, width]. Without `adapters` by the class itself."""
        if adapters is None:
            y: torch.Tensor = super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
            return y
        tokens = len(hidden_states)
        k = top_k_index.shape[-1]
        expert_of, order = torch.sort(top_k_index.reshape(-1))
        offsets = _offsets(expert_of, self.num_experts)
        token_of = order // k

        def gather(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[token_of]

        up = "gate_up_proj" if self.has_gate else "up_proj"
        activate = self._apply_gate if self.has_gate else self.act_fn
        x = gather(hidden_states)
        inner = _project(self, up, x, expert_of, offsets)
        if up in adapters:
            inner = adapters[up].add_to(inner, x, offsets, hidden_states, gather)
        x = activate(inner)
        y = _project(self, "down_proj", x, expert_of, offsets)
        if "down_proj" in adapters:
            y = adapters["down_proj"].add_to(y, x, offsets, inner, activate)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{kind.__name__}", (AdaptedExperts, kind), {})


def _project(
    experts: Any, name: str, x: torch.Tensor, expert_of: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """x [n, in], sorted by expert, times the stack `name`, plus its bias → [n, out]."""
    weight = getattr(experts, name)
    y: torch.Tensor = _grouped_mm(
        x, weight if experts.is_transposed else weight.transpose(-2, -1), offsets
    )
    if experts.has_bias:
        y = y.add_(getattr(experts, f"{name}_bias")[expert_of])
    return y


def _offsets(expert_of: torch.Tensor, experts: int) -> torch.Tensor:
    """The end of each expert's rows, [experts] int32."""
    first = torch.arange(1, experts + 1, device=expert_of.device, dtype=expert_of.dtype)
    return torch.searchsorted(expert_of, first, out_int32=True)


class _ProductWithA(torch.autograd.Function):
    """Stores what its input is made from, and the parameter itself, which strategies free and
    gather again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor,
        source: torch.Tensor,
        remake: Remake,
        experts: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, offsets, source)
        ctx.arguments = (remake, experts)
        return grouped_mm(x, _stack_of_a(weight, experts).transpose(-2, -1), offs=offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight, offsets, source), (remake, experts) = ctx.saved_tensors, ctx.arguments
        gradient = gradient.contiguous()
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grouped_mm(gradient, _stack_of_a(weight, experts), offs=offsets)
        if ctx.needs_input_grad[1]:
            stack = _sum_products(gradient, remake(source), offsets)
            weight_grad = stack[:, : len(weight) // experts].reshape(weight.shape)
        return x_grad, weight_grad, None, None, None, None


class _ProductWithB(torch.autograd.Function):
    """The same for B, whose input is small and stored."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, experts: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.experts = experts
        return grouped_mm(x, _stack_of_b(weight, experts).transpose(-2, -1), offs=offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, offsets), experts = ctx.saved_tensors, ctx.experts
        gradient = gradient.contiguous()
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grouped_mm(gradient, _stack_of_b(weight, experts), offs=offsets)
        if ctx.needs_input_grad[1]:
            stack = _sum_products(gradient, x, offsets)[:, :, : weight.shape[1] // experts]
            weight_grad = stack.permute(1, 2, 0).reshape(weight.shape)
        return x_grad, weight_grad, None, None


def _stack_of_a(weight: torch.Tensor, experts: int) -> torch.Tensor:
    """[experts, padded rank, in] from [experts · rank, in]."""
    stack = weight.view(experts, -1, weight.shape[1])
    missing = -stack.shape[1] % MULTIPLE
    return pad(stack, (0, 0, 0, missing)) if missing else stack


def _stack_of_b(weight: torch.Tensor, experts: int) -> torch.Tensor:
    """[experts, out, padded rank] from [out, rank · experts]."""
    stack = weight.view(len(weight), -1, experts).permute(2, 0, 1)
    return pad(stack, (0, -stack.shape[2] % MULTIPLE)).contiguous()


def _sum_products(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[experts, a, b]: the sum over each expert's rows of left [n, a]ᵀ right [n, b]; zeros for an
    expert without rows."""
    total = grouped_mm(left.T, right, offs=offsets)
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    return total.masked_fill_((counts == 0)[:, None, None], 0)
