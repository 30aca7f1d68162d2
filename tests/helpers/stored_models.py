"""Tiny models as they are published: with other names, shapes and tensors than in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from launcher.model.tiny import byte_tokenizer
from tests.helpers import architectures

Tensors = dict[str, torch.Tensor]

EXPERTS = 5  # fewer than eight ranks, and no number of ranks divides them
TEXT = architectures.TEXT | {
    "vocab_size": 259,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
MOE = TEXT | {"moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
ROUTED = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class that is published, and its config
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE),
    "mixtral": ("MixtralForCausalLM", TEXT | {"num_local_experts": EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        TEXT
        | LATENT
        | ROUTED
        | {"head_dim": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | {"qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        TEXT | ROUTED | {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    "gpt_oss": ("GptOssForCausalLM", TEXT | {"num_local_experts": EXPERTS}),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": TEXT | LINEAR, "vision_config": VISION},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": MOE | LINEAR | {"shared_expert_intermediate_size": 16},
            "vision_config": VISION,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        TEXT
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "num_local_experts": EXPERTS}
        | {"num_experts_per_tok": 2, "shared_intermediate_size": 24},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        TEXT
        | {"moe_intermediate_size": 16, "moe_num_experts": EXPERTS, "moe_k": 2}
        | {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    ),
    "gpt2": ("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259}),
}


def publish(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Write a random model of `kind`, in the layout of its publisher, to `folder`. `settings`:
    changes to its config."""
    name, values = MODELS[kind]
    model_class: Any = getattr(transformers, name)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**{**values, **settings}))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not tensor.any():  # would hide an error
                tensor.normal_(std=0.02)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change the tensors of a model's only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
