"""Runs torch code that only cuts and joins tensors on tensors that are not in memory.

A `Traced` is a torch tensor without data (on the meta device, which gives it its shape) that
carries the `Tensor` of its values. Whatever torch function cannot be followed is refused, so that
code of another library yields the values it would yield, or a UserError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.tensor import Tensor
from launcher.export.tensor.views import joined, narrow, reshaped, transposed


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
        made = list(result) if isinstance(result, tuple | list) else [result]
        if not any(isinstance(each, torch.Tensor) for each in made):
            return result
        if func not in _RULES:
            raise UserError(f"torch's {func.__name__} cannot be done a tile at a time")
        for each, lazy in zip(made, _RULES[func](made, *args, **kwargs), strict=True):
            assert lazy.shape == tuple(each.shape), (func, lazy.shape, each.shape)
            each.lazy = lazy
        return result


def traced(tensor: Tensor) -> Traced:
    """A stand-in of the same shape and dtype that records what is done to it in `lazy`."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(Traced)
    empty.lazy = tensor
    return empty


def _stack(made: list[Traced], tensors: Sequence[Traced], dim: int = 0) -> list[Tensor]:
    dim %= made[0].dim()
    shape = tuple(tensors[0].shape)
    single = (*shape[:dim], 1, *shape[dim:])
    parts = [reshaped(each.lazy, single) for each in tensors]
    return [joined(parts, dim, tuple(made[0].shape))]


def _cat(made: list[Traced], tensors: Sequence[Traced], dim: int = 0) -> list[Tensor]:
    return [joined([each.lazy for each in tensors], dim, tuple(made[0].shape))]


def _split(made: list[Traced], tensor: Traced, _sizes: Any, dim: int = 0) -> list[Tensor]:
    parts, first = [], 0
    for each in made:
        parts.append(narrow(tensor.lazy, dim, first, each.shape[dim], tuple(each.shape)))
        first += each.shape[dim]
    return parts


def _unbind(made: list[Traced], tensor: Traced, dim: int = 0) -> list[Tensor]:
    return [narrow(tensor.lazy, dim, i, 1, tuple(each.shape)) for i, each in enumerate(made)]


def _transpose(_: list[Traced], tensor: Traced, dim0: int, dim1: int) -> list[Tensor]:
    return [transposed(tensor.lazy, dim0, dim1)]


def _reshape(made: list[Traced], tensor: Traced, *_: Any, **__: Any) -> list[Tensor]:
    return [reshaped(tensor.lazy, tuple(made[0].shape))]


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
