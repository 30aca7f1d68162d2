"""Triton's interpreter runs kernels on CPU if TRITON_INTERPRET=1 when triton is imported."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def complete() -> None:
    """Add what Liger's kernels need and Triton 3.9 lacks. Call it before Liger is imported."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    own, own_rounding = interpreter._implicit_cvt, interpreter._convert_float

    def convert(argument: Any) -> Any:
        """A kernel's float arguments are fp32 scalars on a GPU, but Python floats here."""
        if type(argument) is not float:
            return own(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def rounded(values: Any, before: Any, after: Any, mode: Any) -> Any:
        """Round finite fp32 to the nearest bf16, as on a GPU; the interpreter truncates."""
        if (before, after) != (tl.float32, tl.bfloat16):
            return own_rounding(values, before, after, mode)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    interpreter._implicit_cvt = convert
    interpreter._convert_float = rounded
    # NVIDIA's device library contains only names.
    libdevice.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    libdevice.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0
