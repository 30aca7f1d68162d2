"""Tiny mixtures of experts, whose experts transformers fuses into one tensor of three dims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.model.tiny import byte_tokenizer

WIDTH, INNER = 48, 24  # dims that 2, 3 and 4 ranks divide


def make_experts(folder: Path, experts: int, kind: str = "mixtral", **settings: Any) -> Path:
    """Write a model with an untied head and a byte tokenizer to `folder`. The files of a Mixtral
    have a tensor for each expert, those of llama4_text the fused ones."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=min(2, experts - 1),
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
