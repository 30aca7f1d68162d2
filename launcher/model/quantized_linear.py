"""Linear layers whose frozen weights are stored in 4 or 8 bits, in bitsandbytes' formats.

The formats and kernels are bitsandbytes' (QLoRA, https://arxiv.org/abs/2305.14314; LLM.int8(),
https://arxiv.org/abs/2208.07339). Its modules are not used, because they do not work with sharding:
in forward, `Linear4bit` replaces its parameter by one that DeepSpeed does not know, keeps the
gathered weight until backward, and in evaluation on CPUs with AVX512-BF16 repacks it in place.
Here a weight is a plain parameter of bytes that any strategy can shard. It is dequantized for each
multiplication, in forward and in backward. Activations are never quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from launcher.errors import UserError
from launcher.io.module_paths import ends_in
from launcher.io.weight_views import LazyWeight, read_flat_range
from launcher.model.lazy_weight import InParts
from launcher.model.load import Weights


class Scales(Protocol):
    """What is needed to dequantize a weight. It is small and complete on every rank."""

    kind: str  # nf4, fp4 or int8
    nbytes: int

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`, on the device of `packed`."""


class QuantizationFormat(Protocol):
    """How weights are quantized."""

    def packed_layout(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of the packed form of a weight of `shape`."""

    def block_size(self, shape: torch.Size) -> int:
        """Elements of a block of the flattened weight. Blocks are quantized independently."""

    def block_maxima(self, blocks: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of each of `blocks`, [blocks, block size]. fp32, 1-d; not finite
        where a value cannot be quantized."""

    def scales(self, maxima: torch.Tensor, shape: torch.Size) -> Scales:
        """The scales of a weight of `shape`, whose blocks have these `maxima`."""

    def pack(self, blocks: torch.Tensor) -> torch.Tensor:
        """Quantize blocks of a flattened weight, [blocks, block size], to packed elements, 1-d in
        the same order."""


class QuantizedWeight:
    """The packed form of a matrix; each rank quantizes only the part that it keeps, on `device`."""

    def __init__(
        self, source: LazyWeight, format: QuantizationFormat, device: torch.device
    ) -> None:
        self._source, self._format, self._device = source, format, device
        self.shape, self.dtype = format.packed_layout(source.shape)

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        begin = offsets[0] * self.shape[1] + offsets[1]  # the boxes of a flat range are contiguous
        count = math.prod(shape)
        elements, packed_elements = math.prod(self._source.shape), math.prod(self.shape)
        ratio = elements // packed_elements  # elements in one packed element
        block = self._format.block_size(self._source.shape)
        first = begin * ratio // block * block
        last = min(-(-(begin + count) * ratio // block) * block, elements)
        values = read_flat_range(self._source, first, last - first).to(self._device)
        packed = self._format.pack(values.view(-1, block))
        return packed[begin - first // ratio :][:count].view(shape)


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with W [out, in] frozen and quantized."""

    def __init__(self, plain: nn.Linear, packed: torch.Tensor, scales: Scales) -> None:
        nn.Module.__init__(self)  # nn.Linear's would create a weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        is_shared = isinstance(packed, nn.Parameter)
        self.weight = packed if is_shared else nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias
        self.scales = scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _DequantizeAndMultiply.apply(x, self.weight, self.bias, self.scales)
        return y


class _DequantizeAndMultiply(torch.autograd.Function):
    """Saves only the packed parameter for backward; strategies free and gather it again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, scales: Scales
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.scales = scales
        return linear(x, scales.dequantize(packed, x.dtype), bias)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        (packed,) = ctx.saved_tensors
        bias_grad = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ ctx.scales.dequantize(packed, grad.dtype), None, bias_grad, None


def quantize(
    model: nn.Module,
    format: QuantizationFormat,
    weights: Weights | None,
    device: torch.device,
    keep: list[str],
) -> str:
    """Replace the linear layers of `model` by quantized ones, and return a description for the log.

    The output head and layers whose names end with a name in `keep` are not replaced. A weight on
    the meta device is read here to compute its scales, a part of it on each rank; the strategy
    reads it again, also a part on each rank. `device` quantizes. Raises UserError if there is
    nothing to quantize, or a weight that cannot be quantized. Collective if ranks share the work.
    """
    slots = weights.by_parameter() if weights else {}
    before = after = count = 0
    made: dict[int, QuantizedLinear] = {}  # by the weight, which several layers may share
    for name, module in _find_linears(model, keep):
        if (twin := made.get(id(module.weight))) is not None:
            _replace(model, name, QuantizedLinear(twin, twin.weight, twin.scales))
            continue
        slot, shape = slots.get(id(module.weight)), module.weight.shape
        block = format.block_size(shape)
        if module.weight.numel() % block:
            raise UserError(
                f"{name} has {module.weight.numel()} elements, which is not a multiple of {block}; "
                "method.bits=8"
            )
        if slot is None or weights is None:
            blocks = module.weight.detach().to(device).view(-1, block)
            maxima, packed = format.block_maxima(blocks), format.pack(blocks)
            packed = packed.view(format.packed_layout(shape)[0])
            before += module.weight.nbytes
        else:
            maxima = _read_maxima(slot.source, format, device, weights.in_parts)
            before += module.weight.numel() * slot.source.dtype.itemsize
            slot.source = QuantizedWeight(slot.source, format, device)
            packed = torch.empty(slot.source.shape, dtype=slot.source.dtype, device="meta")
        if not maxima.isfinite().all():
            raise UserError(f"{name} has values that are not finite or too large to be quantized")
        scales = format.scales(maxima, shape)
        replacement = QuantizedLinear(module, packed, scales)
        for moved in (slot, slots.get(id(module.bias))):
            if moved is not None:
                moved.module = replacement
        made[id(module.weight)] = replacement
        _replace(model, name, replacement)
        count, after = count + 1, after + packed.nbytes + scales.nbytes
    if count == 0:
        raise UserError(f"{type(model).__name__} has no linear layer to quantize; method=lora")
    return (
        f"{count} linear weights, {before / 1e6:,.1f} MB, quantized to {after / 1e6:,.1f} MB; each "
        "rank reads its part of them"
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _find_linears(model: nn.Module, keep: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        is_kept = any(ends_in(name, suffix) for suffix in keep)
        if isinstance(module, nn.Linear) and module is not head and not is_kept:
            yield name, module


def _read_maxima(
    source: LazyWeight, format: QuantizationFormat, device: torch.device, in_parts: InParts
) -> torch.Tensor:
    """The largest magnitude of each block of `source`, on `device`."""
    block = format.block_size(source.shape)

    def read(begin: int, count: int) -> torch.Tensor:
        values = read_flat_range(source, begin * block, count * block)
        return format.block_maxima(values.to(device).view(-1, block))

    return in_parts(math.prod(source.shape) // block, read)
