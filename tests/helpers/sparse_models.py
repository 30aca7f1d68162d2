"""Tiny mixtures of experts of many families, in memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

DIMS = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    # With a shared expert, whose layers have the names that experts had in transformers 4.
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
    # Experts are [experts, in, out] and have biases; the router is called `router`.
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12},
    "zaya": {},  # the router is an MLP
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},  # it is a subclass of nn.Linear
    # Experts compute in their own way, and are scaled before they compute.
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 12,
        "intermediate_size_mlp": 24,
    },
}


def make_sparse(family: str, **settings: Any) -> Any:
    """A model of `family` with random weights, in fp32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**DIMS, **FAMILIES[family], **settings})
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
