"""Weights that bitsandbytes has quantised, or would."""

from launcher.export.quantised.model import dequantised, round_trip

__all__ = ["dequantised", "round_trip"]
