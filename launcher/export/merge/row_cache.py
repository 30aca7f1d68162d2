"""A cache for values that all rows of a merged tensor need, such as LoRA's factors in fp32."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from launcher.io.tensor import Tensor

LIMIT_BYTES = 16 << 20  # a larger value is cached alone

_lock = threading.Lock()
_values: OrderedDict[tuple[int, str], tuple[Tensor, torch.Tensor]] = OrderedDict()


def cached(tensor: Tensor, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`compute()`, or its earlier result for this tensor object and key. Do not modify the result.

    Threads that ask at the same time may each compute it: that is cheaper than to wait for each
    other.
    """
    cache_key = id(tensor), key
    with _lock:
        entry = _values.get(cache_key)
        if entry is not None and entry[0] is tensor:
            _values.move_to_end(cache_key)
            return entry[1]
    value = compute()
    with _lock:
        # The reference keeps `tensor` alive, so that its id is not reused.
        _values[cache_key] = tensor, value
        _values.move_to_end(cache_key)
        while len(_values) > 1 and sum(v.nbytes for _, v in _values.values()) > LIMIT_BYTES:
            _values.popitem(last=False)
    return value


def cached_fp32(tensor: Tensor, device: str = "cpu") -> torch.Tensor:
    """All values of a tensor in fp32 on the device, cached, in its shape."""
    return cached(tensor, f"fp32 on {device}", lambda: tensor.read_all().float().to(device))
