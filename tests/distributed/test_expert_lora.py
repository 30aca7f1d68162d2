"""Adapters of experts under every strategy, also where some experts get no token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.distributed.process_group import RankInfo
from launcher.method.expert_lora import FusedExpertLora
from tests.helpers import parts
from tests.helpers.experts import make_experts
from tests.helpers.parts import Case

STRATEGIES = [  # strategy, settings of the training, whether the router is adapted
    ("fsdp", {}, True),
    ("ddp", {"activation_checkpointing": "full"}, False),
    ("zero2", {}, False),
    ("zero3", {}, True),
    ("zero3", {"activation_checkpointing": "full"}, False),
]


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose routers always choose the same two of six experts in the first layer, and any
    in the second."""
    folder = make_experts(tmp_path_factory.mktemp("lopsided"), 6)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    (router,) = (name for name in tensors if "layers.0" in name and name.endswith("gate.weight"))
    tensors[router] = torch.zeros_like(tensors[router])
    save_file(tensors, file, {"format": "pt"})
    return folder


def fused_losses(rank_info: RankInfo, case: Case) -> tuple[int, list[float]]:
    """The number of fused stacks, and the losses."""
    state, losses = parts.train(rank_info, case)
    return sum(isinstance(m, FusedExpertLora) for m in state.model.modules()), losses


@pytest.mark.parametrize(("strategy", "training", "target_router"), STRATEGIES)
def test_losses_equal_pefts(
    ranks: Any, lopsided: Path, rows_file: Path, strategy: str, training: dict[str, Any],
    target_router: bool,
) -> None:  # fmt: skip
    plain = Case(
        lopsided, rows_file, method_options={"target_router": target_router}, steps=3,
        global_batch_size=4, learning_rate=1e-2,
    )  # fmt: skip
    case = dataclasses.replace(plain, strategy=strategy, training_options=training)
    expected = parts.expected_losses(plain)
    for fused, found in ranks.run(2, fused_losses, case):
        assert fused == 4, "two stacks in each of two layers"
        assert found == pytest.approx(expected, rel=1e-5)
