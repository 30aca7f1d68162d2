"""The optimizers' settings reach the libraries. Full runs: distributed/test_optimizers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from launcher.config.schema.optimizer import AdafactorConfig
from launcher.training.optimizer import build_optimizer


def stepped(build: Any) -> torch.Tensor:
    """A weight after three steps of an optimizer that `build` makes around it."""
    dice = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 8, generator=dice))
    optimizer = build(weight)
    for _ in range(3):
        weight.grad = torch.randn(6, 8, generator=dice)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("clip_threshold", 0.5), ("decay_rate", -0.3), ("scale_parameter", True)],
)
def test_adafactor_receives_each_setting_of_the_configuration(setting: str, value: Any) -> None:
    def ours(weight: torch.nn.Parameter, **options: Any) -> Any:
        config = AdafactorConfig(learning_rate=1e-2, weight_decay=0.0, **options)
        return build_optimizer(config, [("weight", weight, weight.shape)])

    def theirs(weight: torch.nn.Parameter) -> Any:
        options = {"scale_parameter": False, setting: value}
        return Adafactor([weight], lr=1e-2, relative_step=False, **options)

    found = stepped(lambda weight: ours(weight, **{setting: value}))
    assert torch.equal(found, stepped(theirs))
    assert not torch.allclose(found, stepped(ours)), "the default is another"
