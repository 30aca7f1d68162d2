"""Gathered weights can be freed between forward and backward."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from launcher.strategy.zero3_saved_tensors import save_parameters_not_views


def mixtral(dtype: torch.dtype, experts: str) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    return MixtralForCausalLM(config).to(dtype)


@contextmanager
def taken_away(model: nn.Module) -> Iterator[list[str]]:
    """The parameters as ZeRO-3 leaves them after forward; the names of those still in memory."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    storages = {n: weakref.ref(p.untyped_storage()) for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    yield [name for name, storage in storages.items() if storage() is not None]
    for name, parameter in model.named_parameters():
        parameter.data = values[name]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_results_are_equal_to_the_bit_and_no_weight_stays_in_memory(
    experts: str, dtype: torch.dtype, trained: bool
) -> None:
    plain = mixtral(dtype, experts).requires_grad_(trained)
    ours = copy.deepcopy(plain)
    save_parameters_not_views(ours)
    given = torch.randn(2, 7, 32, dtype=dtype)
    seen, stayed = [], []
    for model in (plain, ours):
        x = given.clone().requires_grad_()
        logits = model(inputs_embeds=x).logits
        with taken_away(model) as alive:
            stayed.append(alive)
        logits.float().square().sum().backward()
        seen.append([logits, x.grad, *(parameter.grad for parameter in model.parameters())])
    assert any("experts" in name for name in stayed[0]), "torch holds on to them"
    assert stayed[1] == []
    for one, other in zip(*seen, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_views_of_views_and_of_part_of_a_storage_are_restored() -> None:
    """Like a buffer into which DeepSpeed gathers several parameters."""
    buffer = torch.arange(40.0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(buffer[10:34].view(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight[1:].T[2:5]

    model, x = Odd(), torch.ones(1, 3, requires_grad=True)
    save_parameters_not_views(model)
    y = model(x)
    weight = model.weight.detach().clone()
    model.weight.data = torch.empty(0)
    buffer.zero_()
    model.weight.data = torch.cat([torch.zeros(5), weight.flatten()])[5:].view(4, 6)
    y.sum().backward()
    assert torch.equal(x.grad, weight[1:, 2:5].sum(0, keepdim=True))
