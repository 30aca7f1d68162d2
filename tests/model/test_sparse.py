"""Experts and routers are found by what they are."""

from __future__ import annotations

import pytest
from torch import nn

from launcher.config.schema.method import LoraConfig
from launcher.io.model_class import causal_class, meta_model
from launcher.method.expert_lora import fuse_experts
from launcher.method.lora import Lora
from launcher.model.sparse import sparse_blocks, unadaptable_experts
from tests.helpers.sparse_models import FAMILIES, make_sparse
from tests.helpers.tiny_models import tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_stacks_and_a_router(family: str) -> None:
    blocks = [block for block in sparse_blocks(make_sparse(family)) if block.stacks]
    assert [block.stacks for block in blocks] == [("gate_up_proj", "down_proj")] * 2
    for layer, block in enumerate(blocks):
        assert block.path.startswith(f"model.layers.{layer}.")
        (router,) = block.routers
        assert router.rpartition(".")[2] in ("gate", "router")


def test_experts_may_be_modules() -> None:
    """As in transformers 4, and in models that bring their own code."""
    layer = nn.ModuleDict(
        {
            "gate": nn.Linear(8, 2),
            "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(2)),
            "shared_expert": nn.Linear(8, 8),
            "shared_expert_gate": nn.Linear(8, 1),
        }
    )
    (block,) = sparse_blocks(nn.ModuleDict({"mlp": layer}))
    assert (block.path, block.stacks, [*block.routers]) == ("mlp.experts", (), ["mlp.gate"])


def test_a_dense_model_has_none() -> None:
    assert sparse_blocks(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 3))) == []


def test_experts_that_can_have_no_adapter_are_named() -> None:
    """DBRX keeps the experts of a layer in one matrix, of which PEFT's layers know nothing."""
    assert not any(unadaptable_experts(make_sparse(family)) for family in FAMILIES)
    config = tiny_config("dbrx")
    model = meta_model(causal_class(config), config)
    model = Lora(LoraConfig(name="lora", rank=2)).prepare(model, 0)
    assert "DbrxExpertGLU get no adapter" in str(fuse_experts(model))
