"""Packed documents are computed as if each were alone, in models that can separate them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.schema.model import ModelConfig
from launcher.data.collate import IGNORED, collate
from launcher.errors import UserError
from launcher.model.attention import PACKED, choose_attention
from launcher.model.load import build_model
from launcher.training.loss import token_loss
from launcher.training.model_checks import check_document_masking

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
# The fast path, transformers' own mask, and windows that are shorter than a document.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4,
              "use_sliding_window": True, "max_window_layers": 1},
    "phi3": {},
    "gemma2": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 4},
}  # fmt: skip
RECURRENT = ("mamba2", "qwen3_next")


def build(name: str, options: dict[str, Any], packed: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **options})
    choice = "eager" if name == "gemma2" else "sdpa"  # transformers supports no other for it
    attention = choose_attention(choice, config, packed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def rows(seed: int = 0) -> list[Any]:
    draw = np.random.default_rng(seed)
    return [
        (draw.integers(1, 64, n).astype(np.int32), draw.random(n) < 0.6) for n in (9, 3, 7, 12, 1)
    ]


def losses(model: torch.nn.Module, sequences: list[list[Any]], packed: bool) -> torch.Tensor:
    """The loss of each target token."""
    batch = collate(sequences, 8, 0, packed)
    logits = model(**batch.inputs()).logits.flatten(0, 1)[batch.target_positions]
    found = cross_entropy(logits, batch.target_ids, reduction="none")
    return found[batch.target_ids != IGNORED]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_and_unpacked_tokens_have_the_same_loss(name: str) -> None:
    alone, packed = (build(name, ARCHITECTURES[name], each) for each in (False, True))
    packed.load_state_dict(alone.state_dict())
    found = losses(packed, [rows()[:3], rows()[3:]], packed=True)
    expected = losses(alone, [[row] for row in rows()], packed=False)
    assert len(found) > 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_token_sees_another_document(name: str) -> None:
    """Neither in forward nor, by the gradient, in backward."""
    model = build(name, ARCHITECTURES[name], True)
    batch = collate([rows()[:3], rows()[3:]], 8, 0, packed=True)
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    documents = batch.documents
    assert documents is not None
    logits = model(inputs_embeds=embedded, use_cache=False, **documents.forward_arguments()).logits
    begins = documents.cu_seqlens.tolist()
    for begin, end in pairwise(begins):
        (reached,) = torch.autograd.grad(
            logits.flatten(0, 1)[begin:end].float().square().sum(), embedded, retain_graph=True
        )
        from_others = reached.flatten(0, 1).abs().sum(1)
        from_others[begin:end] = 0
        assert from_others.max() == 0, f"tokens {begin} to {end} of {begins}"
    check_document_masking(model, CPU, 64, torch.float32)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_model_that_cannot_separate_documents_is_refused(name: str) -> None:
    if name == "mamba2":
        options: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
    else:
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2,
                  "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
        layers = ["linear_attention", "full_attention"]
        options = {"layer_types": layers, "shared_expert_intermediate_size": 16}
        options |= experts | linear
    sizes = {key: value for key, value in SMALL.items() if key not in options}
    config = AutoConfig.for_model(name, **sizes, **options)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"data\.packing=true: .*→ data\.packing=false"):
        check_document_masking(model, CPU, 64, torch.float32)


def test_the_builder_selects_the_packed_attention(tiny: Path) -> None:
    model, _ = build_model(ModelConfig(name_or_path=str(tiny)), tiny, 0, torch.float32, packed=True)
    assert model.config._attn_implementation == PACKED


def test_the_loss_of_a_packed_batch_is_the_sum_over_its_documents(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    together = token_loss(model, collate([rows()], 8, 0, packed=True))
    alone = sum(token_loss(model, collate([[row]], 8, 0, packed=True)) for row in rows())
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
