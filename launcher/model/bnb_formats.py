"""bitsandbytes' 4-bit and 8-bit formats: QLoRA (https://arxiv.org/abs/2305.14314) and LLM.int8()
(https://arxiv.org/abs/2208.07339)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb

from launcher.model.quantized_linear import QuantizationFormat, Scales

BLOCK = 64  # elements of a 4-bit block, which share a scale
NESTED_BLOCK = 256  # scales that share a scale, if the scales are quantized too


@dataclass(frozen=True)
class FourBit(QuantizationFormat):
    """Blocks of 64 elements. Each element is the 4-bit index of a value in [-1, 1], which is
    multiplied by the largest magnitude (absmax) of its block.

    With `nested`, the absmax values minus their mean are quantized to 8 bits (double quantization).
    """

    kind: str  # nf4 or fp4
    nested: bool
    storage: torch.dtype = torch.uint8  # dtype of the parameter that stores the bytes

    def packed_layout(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        return torch.Size([math.prod(shape) // 2 // self.storage.itemsize, 1]), self.storage

    def block_size(self, shape: torch.Size) -> int:
        return BLOCK

    def block_maxima(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks.abs().amax(dim=1).float()

    def scales(self, maxima: torch.Tensor, shape: torch.Size) -> Scales:
        return FourBitScales.from_absmax(maxima, shape, self)

    def pack(self, blocks: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor
        packed, _ = bnb.quantize_4bit(blocks, blocksize=BLOCK, quant_type=self.kind)
        return packed.view(-1).view(self.storage)


class FourBitScales(Scales):
    """The absmax values of a 4-bit weight."""

    def __init__(self, state: bnb.QuantState, shape: torch.Size) -> None:
        """`shape` is that of the weight; that of `state` is another one."""
        self._state, self._shape = state, shape
        self.kind = state.quant_type
        self.nbytes = state.absmax.nbytes
        if state.nested:
            self.nbytes += state.state2.absmax.nbytes + state.state2.code.nbytes

    @classmethod
    def from_absmax(cls, absmax: torch.Tensor, shape: torch.Size, format: FourBit) -> FourBitScales:
        nested: dict[str, Any] = {}
        if format.nested:
            offset = absmax.mean()
            absmax, nested_state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            nested = {"offset": offset, "state2": nested_state}
        state = bnb.QuantState(
            absmax,
            # Not the weight's shape: the CPU kernel of 0.50 is wrong for some numbers of columns.
            shape=torch.Size([math.prod(shape) // BLOCK, BLOCK]),
            dtype=torch.float32,
            blocksize=BLOCK,
            code=bnb.get_4bit_type(format.kind, device=absmax.device),
            quant_type=format.kind,
            **nested,
        )
        return cls(state, shape)

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._state.absmax.device != packed.device:
            self._state.to(packed.device)
        self._state.dtype = dtype
        weight: torch.Tensor = bnb.dequantize_4bit(packed.view(torch.uint8), self._state)
        return weight.view(self._shape)


@dataclass(frozen=True)
class EightBit(QuantizationFormat):
    """Rows of int8. Each row is multiplied by its largest magnitude / 127. As in LLM.int8(), the
    weight is first rounded to fp16."""

    def packed_layout(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        return shape, torch.int8

    def block_size(self, shape: torch.Size) -> int:
        return shape[-1]

    def block_maxima(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks.half().abs().amax(dim=1).float()

    def scales(self, maxima: torch.Tensor, shape: torch.Size) -> Scales:
        return EightBitScales(maxima)

    def pack(self, blocks: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = bnb.int8_vectorwise_quant(blocks.half())[0]
        return packed.view(-1)


class EightBitScales(Scales):
    """The absmax values of the rows of an 8-bit weight."""

    kind = "int8"

    def __init__(self, absmax: torch.Tensor) -> None:
        self._absmax = absmax
        self.nbytes = absmax.nbytes

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self._absmax = self._absmax.to(packed.device)
        weight: torch.Tensor = bnb.int8_vectorwise_dequant(packed, self._absmax)
        return weight.to(dtype)
