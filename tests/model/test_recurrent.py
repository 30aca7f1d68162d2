"""Recurrent layers keep packed documents separate, whichever kind they are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from launcher.data.collate import collate
from launcher.model.activation_checkpointing import checkpoint_activations
from launcher.model.recurrent import describe_kernels, recurrent_layers, separate_documents
from launcher.training.loss import token_loss
from tests.helpers.model_table import documents, packing_of
from tests.helpers.tiny_models import release, tiny_config

# Mamba 1 and 2, both beside attention, gated delta rules, gated linear recurrence, convolutions.
KINDS = (
    "mamba", "mamba2", "falcon_h1", "bamba", "qwen3_next", "kimi_linear", "recurrent_gemma", "lfm2",
)  # fmt: skip


@pytest.mark.parametrize("model_type", KINDS)
def test_packed_documents_have_the_losses_that_they_have_alone(
    model_type: str, tmp_path: Path
) -> None:
    release(model_type, tmp_path / "base")
    assert packing_of(tmp_path / "base") == "yes"


@pytest.mark.parametrize("activations", ["off", "full"])
def test_gradients_of_packed_documents_are_the_sums_of_those_alone(activations: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("bamba"), dtype=torch.float32)
    alone = _gradients(model, [[row] for row in documents()], packed=False)
    assert "once for each document" in (separate_documents(model) or "")
    checkpoint_activations(model, activations)
    found = _gradients(model, [documents()[:2], documents()[2:]], packed=True)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    unpacked = _gradients(model, [[row] for row in documents()], packed=False)
    torch.testing.assert_close(unpacked, alone, rtol=1e-5, atol=1e-6)


def _gradients(model: Any, sequences: list[list[Any]], packed: bool) -> dict[str, torch.Tensor]:
    """Of the summed loss, one micro-batch a sequence."""
    model.train().zero_grad()
    for sequence in sequences:
        token_loss(model, collate([sequence], 8, 0, packed)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_without_recurrent_layers_is_not_changed() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert separate_documents(model) is describe_kernels(model) is None
    assert "forward" not in vars(model)


def test_the_log_names_the_package_whose_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("mamba2"))
    assert describe_kernels(model) == "2 of Mamba2Mixer, by transformers' own torch code"

    def implementation(*args: Any) -> None: ...

    implementation.__module__ = "mamba_ssm.ops.triton.ssd_combined"

    @functools.wraps(recurrent_layers)
    def wrapped(*args: Any) -> None:
        return implementation(*args)

    monkeypatch.setattr(modeling_mamba2, "scan_of_a_package", wrapped, raising=False)
    assert describe_kernels(model) == "2 of Mamba2Mixer, with kernels of mamba_ssm"
