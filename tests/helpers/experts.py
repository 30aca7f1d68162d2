"""A tiny mixture of experts, whose experts transformers fuses into one tensor of three dims."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from launcher.model.tiny import byte_tokenizer

WIDTH, INNER = 48, 24  # dims that 2, 3 and 4 ranks divide


def make_experts(folder: Path, experts: int) -> Path:
    """Write a Mixtral with an untied head and a byte tokenizer to `folder`."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    model = MixtralForCausalLM(
        MixtralConfig(
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
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
