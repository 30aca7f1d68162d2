"""Tensors that are not in memory: a description of where their rows come from."""

from launcher.io.tensor.base import Cast, ConcatRows, InMemory, RowSlice, Tensor, in_memory

__all__ = ["Cast", "ConcatRows", "InMemory", "RowSlice", "Tensor", "in_memory"]
