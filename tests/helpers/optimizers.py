"""Every optimizer and its library's original, in a plain loop."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, Lion
from transformers.optimization import Adafactor

from tests.helpers import parts
from tests.helpers.parts import Case

RATES = {"sgd": 0.3, "lion": 3e-4, "adamw_8bit": 1e-3, "adafactor": 1e-3}
# A shard's blocks have other maxima than the full tensor's blocks: they round differently.
BOUNDS = {"sgd": 1e-5, "lion": 1e-4, "adamw_8bit": 2e-3, "adafactor": 1e-5}


def case_of(tiny: Path, rows_file: Path, optimizer: str, **options: Any) -> Case:
    nesterov = {"nesterov": True} if optimizer == "sgd" else {}
    return Case(
        tiny, rows_file, optimizer=optimizer, optimizer_options=nesterov,
        learning_rate=RATES[optimizer], global_batch_size=12, **options,
    )  # fmt: skip


@cache
def expected_losses(case: Case) -> list[float]:
    """A textbook loop around the library's optimizer."""
    torch.set_num_threads(1)
    model = parts.plain_model(case).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parts.decayed_and_not(trained, case.weight_decay)
    return parts.plain_losses_by(case, model, _theirs(case.optimizer, groups, case.learning_rate))


def _theirs(name: str, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """The library's optimizer with its defaults, except for the settings of the case."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, foreach=False)
    if name == "lion":
        return Lion(groups, lr=rate)
    if name == "adamw_8bit":
        return AdamW8bit(groups, lr=rate)
    return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
