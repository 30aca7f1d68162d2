"""Tensors that are not in memory: where their rows come from, a tile of them at a time."""

from launcher.export.tensor.base import Cast, Held, Rows, Stack, Tensor, held

__all__ = ["Cast", "Held", "Rows", "Stack", "Tensor", "held"]
