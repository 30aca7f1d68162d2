"""Boxes of joined, cut, permuted and reshaped weights are those of the tensors they stand for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launcher.io.conversion import Symbol
from launcher.io.weight_views import LazyWeight, read_flat_range, read_full, read_into, stored_parts


class Stored:
    """A tensor in memory as a `LazyWeight` that counts the elements that are read."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.read_elements = 0

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        self.read_elements += math.prod(shape)
        return self.values[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]


def experts(gates: list[Any], ups: list[Any]) -> Any:
    """Experts in one tensor, gate and up projection in another: [experts, 2 × inner, width]."""
    return torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)


def rope(weight: Any) -> Any:
    """The pairs of each of 3 heads, one behind the other, as halves."""
    heads, width = 3, weight.shape[1]
    halves = weight.view(heads, weight.shape[0] // heads // 2, 2, width).transpose(1, 2)
    return halves.reshape(weight.shape[0], width)


SHAPE = (12, 5)
CASES: dict[str, Callable[..., Any]] = {
    "experts": lambda *w: experts(list(w[:3]), list(w[3:])),
    "transposed experts": lambda *w: experts(list(w[:3]), list(w[3:])).transpose(1, 2).contiguous(),
    "chunk": lambda *w: torch.cat(w).chunk(4, dim=0)[1],
    "split": lambda *w: torch.stack(w).split([4, 8], dim=1)[1],
    "unbind": lambda *w: torch.stack(w, dim=-1).unbind(1)[2],
    "squeeze": lambda *w: torch.stack(w).chunk(6)[4].squeeze(0).unsqueeze(1),
    "permute": lambda *w: torch.stack(w).permute(2, 0, 1)[1:, 2],
    "flatten": lambda *w: torch.stack(w, 1).flatten(1),
    "rope": lambda *w: torch.cat([rope(each) for each in w], dim=1),
    "scalars": lambda *w: torch.stack(w).view(-1)[7:].view(-1, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_every_box_equals_that_of_the_tensor(name: str) -> None:
    values = [torch.randn(SHAPE) for _ in range(6)]
    stored = [Stored(each) for each in values]
    expected = CASES[name](*values)
    weight: LazyWeight = CASES[name](*(Symbol(each, torch.bfloat16) for each in stored)).weight
    assert (weight.shape, weight.dtype) == (expected.shape, torch.float32)
    assert torch.equal(read_full(weight), expected)
    assert {id(part) for part in stored_parts(weight)} <= {id(each) for each in stored}
    choose = random.Random(0)
    for _ in range(40):
        offsets = tuple(choose.randrange(size + 1) for size in expected.shape)
        sizes = tuple(
            choose.randint(0, size - o) for o, size in zip(offsets, expected.shape, strict=True)
        )
        box = weight.read(offsets, sizes)
        slices = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        assert torch.equal(box, expected[slices])
        assert box.is_contiguous()
        begin = choose.randrange(expected.numel() + 1)
        count = choose.randint(0, expected.numel() - begin)
        run = read_flat_range(weight, begin, count)
        assert torch.equal(run, expected.flatten()[begin : begin + count])


def test_ranks_read_each_element_of_experts_once_and_straight_into_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of five experts, three ranks have two, two and one, and a fourth none."""
    gates = [Stored(torch.randn(SHAPE)) for _ in range(5)]
    ups = [Stored(torch.randn(SHAPE)) for _ in range(5)]
    symbols = [[Symbol(each, torch.float32) for each in kind] for kind in (gates, ups)]
    weight = experts(*symbols).weight
    whole = experts([each.values for each in gates], [each.values for each in ups])
    shards = [torch.empty(count, 24, 5, dtype=torch.bfloat16) for count in (2, 2, 1, 0)]
    with monkeypatch.context() as patch:
        patch.delattr(torch, "empty")  # no memory beside the shard and a stored tensor
        for first, shard in zip((0, 2, 4, 5), shards, strict=True):
            read_into(weight, shard, (first, 0, 0))
    assert torch.equal(torch.cat(shards), whole.bfloat16())
    assert {each.read_elements for each in gates + ups} == {math.prod(SHAPE)}


def test_an_operation_that_computes_is_refused() -> None:
    symbol = Symbol(Stored(torch.randn(SHAPE)), torch.float32)
    with pytest.raises(NotImplementedError, match=r"aten\.add.* computes values"):
        symbol + 1
    with pytest.raises(NotImplementedError, match="step"):
        symbol[::2]


def test_weights_of_different_shapes_cannot_be_joined() -> None:
    symbols = [Symbol(Stored(torch.randn(2, size)), torch.float32) for size in (3, 4)]
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        torch.cat(symbols)  # type: ignore[arg-type]
