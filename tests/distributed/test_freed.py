"""A linear layer that lets its weight be freed between forward and backward."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from launcher.strategy.freed import FreedLinear, free_linears


def freed(layer: nn.Linear) -> nn.Linear:
    other = copy.deepcopy(layer)
    free_linears(nn.Sequential(other))
    assert type(other) is FreedLinear
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_results_are_the_same_to_the_bit(dtype: torch.dtype, bias: bool, trained: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(trained)
    ours, x = freed(plain), torch.randn(2, 7, 24, dtype=dtype)
    seen = []
    for layer in (plain, ours):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        seen.append([y, given.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*seen, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_weight_can_be_taken_away_and_brought_back() -> None:
    """As ZeRO-3 does it; torch's own layer holds on to the memory."""
    alive = {}
    for layer in (nn.Linear(8, 8), freed(nn.Linear(8, 8))):
        y = layer(torch.ones(1, 8, requires_grad=True))
        values = layer.weight.detach().clone()
        storage = weakref.ref(layer.weight.untyped_storage())
        layer.weight.data = torch.empty(0)
        alive[type(layer)] = storage() is not None
        layer.weight.data = values
        y.sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones(8, 8))
    assert alive == {nn.Linear: True, FreedLinear: False}


def test_other_kinds_of_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(2, 2), nn.Embedding(2, 2))
    free_linears(model)
    assert [type(each) for each in model] == [Own, nn.Embedding]
