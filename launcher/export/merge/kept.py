"""What the rows of a merged tensor share: held in memory while it is being written."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from launcher.export.tensor import Tensor

LIMIT = 16 << 20  # bytes; one value may exceed it, and is then alone

_lock = threading.Lock()
_values: OrderedDict[tuple[int, str], tuple[Tensor, torch.Tensor]] = OrderedDict()


def kept(of: Tensor, what: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`make()`, or what it gave for this very tensor lately. Do not write into it.

    Threads that ask at once may each make it: that costs less than waiting for each other.
    """
    key = id(of), what
    with _lock:
        found = _values.get(key)
        if found is not None and found[0] is of:
            _values.move_to_end(key)
            return found[1]
    value = make()
    with _lock:
        _values[key] = of, value  # holds `of`, so that its id stays its own
        _values.move_to_end(key)
        while len(_values) > 1 and sum(each.nbytes for _, each in _values.values()) > LIMIT:
            _values.popitem(last=False)
    return value


def in_fp32(of: Tensor, device: str = "cpu") -> torch.Tensor:
    """All of a tensor's values on the device, kept, in its shape."""
    return kept(of, f"fp32 on {device}", lambda: of.whole().float().to(device))
