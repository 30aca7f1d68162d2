"""Weights that are made of other weights by moving their values: joined, cut, permuted, reshaped.

A model in memory often has its tensors in other shapes than its files: experts in one tensor, gate
and up projection in another. A box of such a tensor is read from the boxes of the stored tensors
that it consists of, straight into its place, so a rank needs memory for what it keeps and for one
stored box. Values are never computed; dtypes are those of the files, and the reader casts once.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from launcher.io.boxes import Box, boxes, intersection, runs

DIFFERENT_SHAPES = "tensors of the shapes"  # how a message begins: they cannot be joined


class LazyWeight(Protocol):
    """A tensor of which each rank reads only the part that it keeps."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`."""


class Placed(ABC):
    """A `LazyWeight` whose values are read straight into their place."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def read_into(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        """Write the box of `out`'s shape at `offsets` to `out`, which may have any strides."""

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`, contiguous."""
        out = torch.empty(shape, dtype=self.dtype)
        read_into(self, out, offsets)
        return out


class View(Placed):
    """A `LazyWeight` made of others."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[LazyWeight]:
        """What it is made of."""


class Joined(View):
    """Weights of the same shape, apart from `dim`, one behind the other along it."""

    def __init__(self, weights: Sequence[LazyWeight], dim: int) -> None:
        """Raises ValueError if the shapes do not fit."""
        sizes = [weight.shape[dim] for weight in weights]
        others = {(*weight.shape[:dim], *weight.shape[dim + 1 :]) for weight in weights}
        if len(others) != 1:
            raise different_shapes(weights)
        first = weights[0].shape
        self.shape = torch.Size((*first[:dim], sum(sizes), *first[dim + 1 :]))
        self.dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
        self._weights, self._dim = weights, dim
        self._begins = [0, *itertools.accumulate(sizes)]

    @property
    def parts(self) -> Sequence[LazyWeight]:
        return self._weights

    def read_into(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        wanted = (offsets, tuple(out.shape))
        origin = [0] * len(offsets)
        for weight, begin in zip(self._weights, self._begins, strict=False):
            origin[self._dim] = begin
            common = intersection(wanted, (tuple(origin), tuple(weight.shape)))
            if common is not None:
                inside = _relative(common[0], origin)
                read_into(weight, _box_of(out, (_relative(common[0], offsets), common[1])), inside)


class Cut(View):
    """The box of `shape` at `offsets` of a weight."""

    def __init__(
        self, weight: LazyWeight, offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        self.shape, self.dtype = torch.Size(shape), weight.dtype
        self._weight, self._offsets = weight, offsets

    @property
    def parts(self) -> Sequence[LazyWeight]:
        return (self._weight,)

    def read_into(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        inside = tuple(own + base for own, base in zip(offsets, self._offsets, strict=True))
        read_into(self._weight, out, inside)


class Permuted(View):
    """A weight with its dims in the order `dims`, as `Tensor.permute` takes it."""

    def __init__(self, weight: LazyWeight, dims: tuple[int, ...]) -> None:
        self.shape = torch.Size(weight.shape[dim] for dim in dims)
        self.dtype = weight.dtype
        self._weight = weight
        self._inverse = tuple(dims.index(dim) for dim in range(len(dims)))

    @property
    def parts(self) -> Sequence[LazyWeight]:
        return (self._weight,)

    def read_into(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        inside = tuple(offsets[dim] for dim in self._inverse)
        read_into(self._weight, out.permute(self._inverse), inside)


class Reshaped(View):
    """The values of a weight, in their order, in another shape."""

    def __init__(self, weight: LazyWeight, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = torch.Size(shape), weight.dtype
        self._weight = weight
        self._only_ones = _without_ones(shape) == _without_ones(tuple(weight.shape))

    @property
    def parts(self) -> Sequence[LazyWeight]:
        return (self._weight,)

    def read_into(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        if self._only_ones:  # a box stays a box
            sizes = iter(_pairs(offsets, out.shape, self.shape))
            inner = [(0, 1) if size == 1 else next(sizes) for size in self._weight.shape]
            out = out.view([size for _, size in inner])
            read_into(self._weight, out, tuple(begin for begin, _ in inner))
            return
        for begin, box in runs((offsets, tuple(out.shape)), tuple(self.shape)):
            run = _box_of(out, box)
            run.copy_(read_flat_range(self._weight, begin, run.numel()).view(run.shape))


def different_shapes(weights: Iterable[LazyWeight]) -> ValueError:
    """The error for weights that do not fit beside each other."""
    shapes = dict.fromkeys(str(list(weight.shape)) for weight in weights)
    return ValueError(f"{DIFFERENT_SHAPES} {' and '.join(shapes)}")


def read_full(weight: LazyWeight) -> torch.Tensor:
    """The complete tensor."""
    shape = tuple(weight.shape)
    return weight.read((0,) * len(shape), shape)


def read_flat_range(weight: LazyWeight, begin: int, count: int) -> torch.Tensor:
    """Elements [begin, begin + count) of the flattened tensor, 1-d.

    Of the rest of the tensor, only the rows in which the range begins and ends are read.
    """
    out = torch.empty(count, dtype=weight.dtype)
    read_flat_into(weight, out, begin)
    return out


def read_flat_into(weight: LazyWeight, out: torch.Tensor, begin: int) -> None:
    """Write elements [begin, begin + len(out)) of the flattened tensor to `out`, 1-d."""
    at = 0
    for offsets, sizes in boxes(begin, len(out), tuple(weight.shape)):
        box = out[at : at + math.prod(sizes)]
        read_into(weight, box.view(sizes), offsets)
        at += len(box)


def read_into(weight: LazyWeight, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
    """Write the box of `out`'s shape at `offsets` to `out`, which may be of another dtype and on
    another device. Beside it, memory is needed for a part of one stored tensor."""
    if out.numel() == 0:
        return
    if isinstance(weight, Placed):
        weight.read_into(out, offsets)
    else:  # moved first and cast there
        out.copy_(weight.read(offsets, tuple(out.shape)).to(out.device))


def stored_parts(weight: LazyWeight) -> Iterator[LazyWeight]:
    """The weights that are not views of others, from which `weight` is read."""
    if isinstance(weight, View):
        for part in weight.parts:
            yield from stored_parts(part)
    else:
        yield weight


def _box_of(values: torch.Tensor, box: Box) -> torch.Tensor:
    return values[tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))]


def _relative(offsets: Sequence[int], origin: Sequence[int]) -> tuple[int, ...]:
    return tuple(offset - begin for offset, begin in zip(offsets, origin, strict=True))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _pairs(
    offsets: tuple[int, ...], sizes: torch.Size, shape: torch.Size
) -> Iterator[tuple[int, int]]:
    """(offset, size) of a box of a tensor of `shape`, without the dims of size 1."""
    for offset, size, whole in zip(offsets, sizes, shape, strict=True):
        if whole != 1:
            yield offset, size
