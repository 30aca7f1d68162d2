"""Formats of a quantized base, and a weight quantized by bitsandbytes alone."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4-plain": {"quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
}


def round_trip(weight: torch.Tensor, form: str) -> torch.Tensor:
    """`weight` quantized to `form` and dequantized by bitsandbytes, in fp32."""
    options = FORMATS[form]
    if "bits" in options:
        packed, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(packed, absmax).float()
    kind = options["quant_type"] if "quant_type" in options else "nf4"
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics="double_quant" not in options
    )
    state.shape, state.dtype = torch.Size([weight.numel() // 64, 64]), torch.float32
    return functional.dequantize_4bit(packed, state).view(weight.shape)
