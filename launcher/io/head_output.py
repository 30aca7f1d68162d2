"""What a model makes of the output of its head, tried without its layers and without its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def output_behind(
    model: Any, bare: Any, head: nn.Linear, output: torch.Tensor
) -> tuple[Any, list[tuple[int, ...]]]:
    """What the model returns as logits if its head returns `output` for two positions, and the
    shapes that the head gets. `bare`: the model without adapters. Raises what the model raises."""
    hidden = torch.zeros(1, 2, head.in_features)
    input_shapes: list[tuple[int, ...]] = []

    def stand_in(head_input: torch.Tensor) -> torch.Tensor:
        input_shapes.append(tuple(head_input.shape))
        return output

    with (
        torch.no_grad(),
        _replaced_forward(bare.base_model, lambda *_, **__: _HiddenStates(hidden)),
        _replaced_forward(head, stand_in),
    ):
        found = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
    return found, input_shapes


def differs_behind_head(model: Any, other: Any) -> bool:
    """Whether the two compute other logits from the same output of their heads: one of them scales
    or caps it. False if it cannot be tried."""
    found = []
    for each in (model, other):
        head = each.get_output_embeddings()
        if not isinstance(head, nn.Linear) or each.base_model is each:
            return False
        output = torch.linspace(-100, 100, 2 * head.out_features).view(1, 2, -1)
        try:
            found.append(output_behind(each, each, head, output)[0])
        except Exception:  # each class computes in its own way
            return False
    one, two = found
    return one.shape == two.shape and not torch.allclose(one, two)


class _HiddenStates:
    """A stand-in for the output of the layers, with hidden states and nothing else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    original = vars(module).get("forward")  # set on the instance, if at all
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if original is not None:
            module.forward = original
