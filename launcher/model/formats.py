"""bitsandbytes' 4-bit and 8-bit formats: QLoRA (https://arxiv.org/abs/2305.14314) and LLM.int8()
(https://arxiv.org/abs/2208.07339)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bits

from launcher.model.quantised import Format, Scales

BLOCK = 64  # elements that share one scale in 4 bits
NESTED_BLOCK = 256  # scales that share one, where scales are quantised too


@dataclass(frozen=True)
class FourBit(Format):
    """Blocks of 64 elements, each a 4-bit index of a value in [-1, 1], times the block's largest
    magnitude; with `nested` those are held in 8 bits less their mean (double quantisation)."""

    kind: str  # nf4 or fp4
    nested: bool
    storage: torch.dtype = torch.uint8  # that holds the bytes

    def layout(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        return torch.Size([math.prod(shape) // 2 // self.storage.itemsize, 1]), self.storage

    def unit(self, shape: torch.Size) -> int:
        return BLOCK

    def scales(self, weight: torch.Tensor) -> Scales:
        absmax = weight.reshape(-1, BLOCK).abs().amax(dim=1).float()
        return FourBitScales.of(absmax, weight.shape, self)

    def fits(self, weight: torch.Tensor) -> bool:
        return bool(torch.stack(weight.aminmax()).isfinite().all())

    def pack(self, run: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor
        packed, _ = bits.quantize_4bit(run, blocksize=BLOCK, quant_type=self.kind)
        return packed.view(-1).view(self.storage)


class FourBitScales(Scales):
    def __init__(self, state: bits.QuantState, shape: torch.Size) -> None:
        self._state, self._shape = state, shape
        self.kind = state.quant_type
        self.nbytes = state.absmax.nbytes
        if state.nested:
            self.nbytes += state.state2.absmax.nbytes + state.state2.code.nbytes

    @classmethod
    def of(cls, absmax: torch.Tensor, shape: torch.Size, form: FourBit) -> FourBitScales:
        more: dict[str, Any] = {}
        if form.nested:
            offset = absmax.mean()
            absmax, above = bits.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            more = {"offset": offset, "state2": above}
        state = bits.QuantState(
            absmax,
            # Not the weight's own: the CPU kernel of 0.50 is wrong for some numbers of columns.
            shape=torch.Size([math.prod(shape) // BLOCK, BLOCK]),
            dtype=torch.float32,
            blocksize=BLOCK,
            code=bits.get_4bit_type(form.kind, device=absmax.device),
            quant_type=form.kind,
            **more,
        )
        return cls(state, shape)

    def dequantise(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._state.absmax.device != packed.device:
            self._state.to(packed.device)
        self._state.dtype = dtype
        whole: torch.Tensor = bits.dequantize_4bit(packed.view(torch.uint8), self._state)
        return whole.view(self._shape)


@dataclass(frozen=True)
class EightBit(Format):
    """Rows of int8, each times its largest magnitude / 127, by way of fp16 as LLM.int8() does."""

    def layout(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        return shape, torch.int8

    def unit(self, shape: torch.Size) -> int:
        return shape[-1]

    def scales(self, weight: torch.Tensor) -> Scales:
        return EightBitScales(weight.half().abs().amax(dim=1).float())

    def fits(self, weight: torch.Tensor) -> bool:
        return bool(torch.stack(weight.aminmax()).half().isfinite().all())

    def pack(self, run: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = bits.int8_vectorwise_quant(run.half())[0]
        return packed.view(-1)


class EightBitScales(Scales):
    kind = "int8"

    def __init__(self, absmax: torch.Tensor) -> None:
        self._absmax = absmax
        self.nbytes = absmax.nbytes

    def dequantise(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self._absmax = self._absmax.to(packed.device)
        whole: torch.Tensor = bits.int8_vectorwise_dequant(packed, self._absmax)
        return whole.to(dtype)
