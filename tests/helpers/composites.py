"""Tiny composites: a text model beside a vision tower, and the tensors of a head that transformers
does not build."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from launcher.model.tiny import byte_tokenizer
from tests.helpers import stored_models

TEXT = stored_models.TEXT | {"intermediate_size": 48}
LINEAR = stored_models.LINEAR | {
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    },
}
MOE = {
    "moe_intermediate_size": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 8,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "intermediate_size": 24,
    "deepstack_visual_indexes": [],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": TEXT | LINEAR, "vision_config": QWEN_VISION},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": TEXT | LINEAR | MOE, "vision_config": QWEN_VISION},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": TEXT
            | {
                "intermediate_size_mlp": 40,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 64,
                "no_rope_layer_interval": 2,
            },
            "vision_config": VISION
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": TEXT | {"cross_attention_layers": [1]},
            "vision_config": {
                **VISION,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": TEXT | {"sliding_window": 64},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        },
    ),
    "llava": (  # its language model is a Qwen2
        "LlavaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": TEXT
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            "vision_config": QWEN_VISION,
        },
    ),
}


def make_composite(name: str, folder: Path) -> Path:
    """Write the composite with random values, a head for two tokens at once that no class of
    transformers builds, and a byte tokenizer."""
    kind, settings = COMPOSITES[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(**deepcopy(settings)))
    with torch.no_grad():
        for parameter in model.parameters():  # some are not initialized, or zero
            parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.randn(8, 8)}, file, {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_composite(name: str, folder: Path) -> Any:
    """The composite in fp32, with every tensor from the files."""
    model, info = getattr(transformers, COMPOSITES[name][0]).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    return model.eval()
