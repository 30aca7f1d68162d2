"""Counts what operations on fake tensors would cost a device, beside their memory."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch._ops import OpOverload

from launcher.memory.mem_tracker import DEVICE_OF, MemTracker

aten = torch.ops.aten
# Operation → position of the left factor among its arguments; the right factor follows it.
PRODUCTS = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.addmm: 1,
    aten.addmm_: 1,
    aten.baddbmm: 1,
    aten._grouped_mm: 0,
}
FORWARD, BACKWARD = 2.0, 5.0  # operations for each pair, element of a head, and masked half


class WorkTracker(MemTracker):
    """A MemTracker that also counts operations. The counters only grow.

    It frees the garbage of a phase at its end: the peaks of short and of whole traces would not
    agree if they depended on when Python does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0  # of matrix products and attention
        self.written = 0  # bytes of new storages
        self.kernels = 0  # operations that write

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        gc.collect()
        self._phase = phase

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE_OF:
            return super().__torch_dispatch__(func, types, args, kwargs)
        written = self.written
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is not NotImplemented:
            self.flops += flops_of(func, args)
            self.kernels += self.written > written or func._schema.is_mutable
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self.written += storage.nbytes()
        super()._count(storage)


def flops_of(func: OpOverload, args: Any) -> float:
    """Operations of a matrix product, or of causal attention (half of all pairs); 0 of others."""
    packet = func.overloadpacket
    if packet in PRODUCTS:
        left, right = args[PRODUCTS[packet] :][:2]
        return float(2 * left.numel() * right.shape[-1])
    name = func._schema.name
    if "attention" not in name:
        return 0.0
    is_backward = "backward" in name
    query, key, value = args[is_backward : is_backward + 3]  # the gradient comes first
    # Heads last but one or second: [rows, heads, length, size], or packed [tokens, heads, size].
    pairs = query.numel() // query.shape[-1] * key.shape[-2 if query.ndim == 4 else 0] / 2
    sizes = query.shape[-1] + value.shape[-1]
    return float(pairs * sizes * (BACKWARD if is_backward else FORWARD))
