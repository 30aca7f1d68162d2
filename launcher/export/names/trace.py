"""Runs torch code that only cuts, joins and reshapes tensors on tensors that are not in memory.

A `Traced` is a torch tensor without data, on the meta device, which tracks its shape. It carries
the `Tensor` of its values. A torch function that is not supported raises UserError, so that the
code of another library either gives its usual values or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from launcher.errors import UserError
from launcher.io.tensor import Tensor
from launcher.io.tensor.views import concat, narrow, reshape, transpose


class Traced(torch.Tensor):
    lazy: Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_function__(func, types, args, kwargs)
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        if not any(isinstance(output, torch.Tensor) for output in outputs):
            return result
        if func not in _RULES:
            raise UserError(f"torch's {func.__name__} cannot be done tile by tile")
        for output, lazy in zip(outputs, _RULES[func](outputs, *args, **kwargs), strict=True):
            assert lazy.shape == tuple(output.shape), (func, lazy.shape, output.shape)
            output.lazy = lazy
        return result


def trace(tensor: Tensor) -> Traced:
    """A stand-in of the same shape and dtype. Its `lazy` records what is done to it."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(Traced)
    empty.lazy = tensor
    return empty


# Each rule takes the outputs on the meta device and the arguments of the torch function.


def _stack(outputs: list[Traced], tensors: Sequence[Traced], dim: int = 0) -> list[Tensor]:
    dim %= outputs[0].dim()
    shape = tuple(tensors[0].shape)
    single = (*shape[:dim], 1, *shape[dim:])
    parts = [reshape(tensor.lazy, single) for tensor in tensors]
    return [concat(parts, dim, tuple(outputs[0].shape))]


def _cat(outputs: list[Traced], tensors: Sequence[Traced], dim: int = 0) -> list[Tensor]:
    return [concat([tensor.lazy for tensor in tensors], dim, tuple(outputs[0].shape))]


def _split(outputs: list[Traced], tensor: Traced, _sizes: Any, dim: int = 0) -> list[Tensor]:
    parts, first = [], 0
    for output in outputs:
        parts.append(narrow(tensor.lazy, dim, first, output.shape[dim], tuple(output.shape)))
        first += output.shape[dim]
    return parts


def _unbind(outputs: list[Traced], tensor: Traced, dim: int = 0) -> list[Tensor]:
    return [narrow(tensor.lazy, dim, i, 1, tuple(output.shape)) for i, output in enumerate(outputs)]


def _transpose(_: list[Traced], tensor: Traced, dim0: int, dim1: int) -> list[Tensor]:
    return [transpose(tensor.lazy, dim0, dim1)]


def _reshape(outputs: list[Traced], tensor: Traced, *_: Any, **__: Any) -> list[Tensor]:
    return [reshape(tensor.lazy, tuple(outputs[0].shape))]


_RULES: dict[Callable[..., Any], Callable[..., list[Tensor]]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.chunk: _split,
    torch.Tensor.chunk: _split,
    torch.split: _split,
    torch.Tensor.split: _split,
    torch.unbind: _unbind,
    torch.Tensor.unbind: _unbind,
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.Tensor.squeeze: _reshape,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.view: _reshape,
    torch.Tensor.contiguous: _reshape,
}
