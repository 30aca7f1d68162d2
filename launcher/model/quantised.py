"""Linear layers whose frozen weights are held in 4 or 8 bits, in bitsandbytes' formats.

The formats and kernels are bitsandbytes' (QLoRA, https://arxiv.org/abs/2305.14314; LLM.int8(),
https://arxiv.org/abs/2208.07339); its modules are not used, for what sharding does to them:
`Linear4bit` replaces its parameter in forward by one that DeepSpeed does not know, keeps the
gathered weight until backward, and in evaluation on CPUs with AVX512-BF16 repacks it in place.
Here a weight is a plain parameter of bytes, so that a strategy shards it as any other, and is
dequantised where it is multiplied, in forward and in backward. Activations are never quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from launcher.errors import UserError
from launcher.model.load import Weights
from launcher.model.stored import Stored, read_run, read_whole


class Scales(Protocol):
    """What a quantised weight is dequantised with; small, and whole on every rank."""

    kind: str  # nf4, fp4 or int8
    nbytes: int

    def dequantise(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`, on the device of `packed`."""


class Format(Protocol):
    """How weights are quantised."""

    def layout(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of what a weight of `shape` becomes."""

    def unit(self, shape: torch.Size) -> int:
        """Elements that are quantised together: each such run of the flattened weight alone."""

    def scales(self, weight: torch.Tensor) -> Scales: ...

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether all values can be quantised."""

    def pack(self, run: torch.Tensor) -> torch.Tensor:
        """Units of a flattened weight, [units, unit], as packed elements, 1-d in their order."""


class Quantised:
    """A stored matrix as it is in memory: each rank quantises what it keeps, on `device`."""

    def __init__(self, of: Stored, form: Format, device: torch.device) -> None:
        self._of, self._form, self._device = of, form, device
        self.shape, self.dtype = form.layout(of.shape)

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        begin = offsets[0] * self.shape[1] + offsets[1]  # boxes of a run are contiguous
        whole, packed = math.prod(self._of.shape), math.prod(self.shape)
        each = whole // packed  # elements in one packed element
        unit = self._form.unit(self._of.shape)
        first = begin * each // unit * unit
        last = min(-(-(begin + math.prod(shape)) * each // unit) * unit, whole)
        run = read_run(self._of, first, last - first).to(self._device)
        found = self._form.pack(run.view(-1, unit))
        return found[begin - first // each :][: math.prod(shape)].view(shape)


class QuantisedLinear(nn.Linear):
    """y = x Wᵀ + b with W [out, in] frozen and quantised."""

    def __init__(self, plain: nn.Linear, packed: torch.Tensor, scales: Scales) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias
        self.scales = scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Linear.apply(x, self.weight, self.bias, self.scales)
        return y


class _Linear(torch.autograd.Function):
    """What is kept for backward is the parameter itself, which strategies free and gather again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, scales: Scales
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.scales = scales
        return linear(x, scales.dequantise(packed, x.dtype), bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        (packed,) = ctx.saved_tensors
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ ctx.scales.dequantise(packed, gradient.dtype), None, of_bias, None


def quantise(
    model: nn.Module, form: Format, weights: Weights | None, device: torch.device, keep: list[str]
) -> str:
    """Replace the linear layers of `model` by quantised ones; what was done in words.

    The output head stays, and what the names in `keep` end. A weight on meta is read here for its
    scales, one at a time and whole, and again by the strategy, a part on each rank. `device` does
    the work. Raises UserError where there is nothing to quantise, or a weight that cannot be.
    """
    slots = weights.by_parameter() if weights else {}
    before = after = largest = count = 0
    for name, module in _linears(model, keep):
        slot = slots.get(id(module.weight))
        whole = read_whole(slot.stored) if slot else module.weight.detach()
        _refuse_unfit(name, whole, form)
        scales = form.scales(whole.to(device))
        if slot is None:
            packed = form.pack(whole.to(device).view(-1, form.unit(whole.shape)))
            packed = packed.view(form.layout(whole.shape)[0])
        else:
            slot.stored = Quantised(slot.stored, form, device)
            packed = torch.empty(slot.stored.shape, dtype=slot.stored.dtype, device="meta")
        replacement = QuantisedLinear(module, packed, scales)
        for other in (slot, slots.get(id(module.bias))):
            if other is not None:
                other.module = replacement
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
        count, largest = count + 1, max(largest, whole.nbytes)
        before, after = before + whole.nbytes, after + packed.nbytes + scales.nbytes
    if count == 0:
        raise UserError(f"{type(model).__name__} has no linear layer to quantise; method=lora")
    return (
        f"{count} linear weights, {before / 1e6:,.1f} MB, quantised to {after / 1e6:,.1f} MB; "
        f"loading holds one at a time, at most {largest / 1e6:,.1f} MB"
    )


def _linears(model: nn.Module, keep: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        kept = any(name == each or name.endswith(f".{each}") for each in keep)
        if isinstance(module, nn.Linear) and module is not head and not kept:
            yield name, module


def _refuse_unfit(name: str, weight: torch.Tensor, form: Format) -> None:
    unit = form.unit(weight.shape)
    if weight.numel() % unit:
        raise UserError(
            f"{name} has {weight.numel()} elements, which are no blocks of {unit}; method.bits=8"
        )
    if not form.fits(weight):
        raise UserError(f"{name} holds values that are not finite or too large to be quantised")
