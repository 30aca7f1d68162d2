"""Quantized weights: dequantized, quantized again in the format of their base, and the effect of
quantization on other weights."""

from launcher.export.quantized.dequantize import dequantize_tensors, quantize_round_trip
from launcher.export.quantized.released import has_unscaled

__all__ = ["dequantize_tensors", "has_unscaled", "quantize_round_trip"]
