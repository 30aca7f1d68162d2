"""Weights that bitsandbytes has quantized, and the effect of its quantization on other weights."""

from launcher.export.quantized.dequantize import dequantize_tensors, quantize_round_trip

__all__ = ["dequantize_tensors", "quantize_round_trip"]
