"""A tiny config of every causal model type of transformers: its own config class with small sizes.

Sizes are replaced by the names of attributes, in every part of a composite. What a type needs
beyond that is in `EXCEPTIONS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from launcher.io.absent_towers import absent_towers, towers_may_be_absent
from launcher.model.tiny import byte_tokenizer

VOCABULARY, WIDTH, LAYERS = 259, 32, 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"),
        VOCABULARY,
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim"), WIDTH),
    **dict.fromkeys(
        ("projection_dim", "out_hidden_size", "embedding_size", "word_embed_proj_dim"), WIDTH
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim",
         "ffn_hidden_size", "shared_intermediate_size", "dim_ff", "d_inner",
         "intermediate_size_mlp"), 48,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers",
         "encoder_layers", "depth", "num_decoder_layers", "num_encoder_layers"), LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_heads",
         "num_decoder_attention_heads", "num_encoder_attention_heads"), 4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
         "moe_shared_expert_intermediate_size"), 16,
    ),
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "sliding_window": 16, "attention_chunk_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64,
    "state_size": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_n_groups": 1, "n_groups": 1, "time_step_rank": 4, "mamba_dt_rank": 4,
    "mamba_chunk_size": 16, "chunk_size": 16,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 32,
    "image_size": 16, "patch_size": 4, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "attention_dropout": 0.0, "is_decoder": True,
    "initializer_range": 0.1,  # so that logits differ enough to compare them
}  # fmt: skip

MLA = {"num_key_value_heads": 4, "head_dim": 4}  # multi-head latent attention: that of rope
DOTS3: dict[str, Any] = {
    "num_key_value_heads": 4, "shared_experts_intermediate_size": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8, "swa_qk_rope_head_dim": 4, "swa_qk_nope_head_dim": 4,
    "swa_v_head_dim": 8, "swa_head_dim": 8,
}  # fmt: skip
DRAFT = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "num_hidden_layers": LAYERS, "num_kv_shared_layers": LAYERS,
}  # fmt: skip
INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
HALF_MROPE = MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
QSA: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# What the sizes above do not fit: constraints of shapes, and values without which a class does not
# compute.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": MLA
    | {"num_expert_group": 1, "num_experts_per_token": 2, "layer_group_size": 2, "head_dim": 8},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 3},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_embeddings": 16,
        },
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": MROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {
            "adapter_input_size": WIDTH,
            "adapter_out_dim": WIDTH,
            "downsample_hidden_size": 16,
        },
    },
    "dots3_note_text": DOTS3,
    "deepseek_v4": {"o_lora_rank": 8, "o_groups": 2},
    "emu3": {
        "vocabulary_map": {"<image>": 3},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "codebook_size": 16,
        },
    },
    "got_ocr2": {"vision_config": {"mlp_dim": 48, "output_channels": 16}},
    "inkling_text": INKLING,
    "inkling2_text": INKLING,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": WIDTH}}},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 16,
            "num_blocks": 1,
            "depthwise_separable_out_channel": 16,
            "feature_layer": -1,
        },
    },
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16)},
    "roc_bert": {
        "shape_vocab_size": 30,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 30,
        "pronunciation_embed_dim": 16,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "ctrl": {"dff": 48},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 2,
    },
    "zamba2": {  # two blocks, one of them at two depths
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 5,
        "num_mem_blocks": 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "ffn_hidden_size": 16},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "fast_vlm": {
        "vision_config": {"hidden_size": WIDTH, "architecture": "test_efficientnet"},
    },
    "gemma3n": {"vision_config": {"architecture": "test_efficientnet"}},
    "glm4v": {"text_config": {"rope_parameters": HALF_MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": HALF_MROPE}},
    "glm46v": {"text_config": {"rope_parameters": HALF_MROPE}},
    "glmga": {"text_config": {"rope_parameters": HALF_MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": HALF_MROPE}},
    "gptj": {"rotary_dim": 4},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": MLA
    | {
        "num_expert_group": 1,
        "num_experts_per_token": 2,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
    },
    "kimi_k25": {"text_config": MLA},
    "longcat_flash": MLA | {"zero_expert_num": 2},
    "minicpm3": MLA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "youtu": MLA,
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {"text_config": DRAFT},
    "gemma4_unified_assistant": {"text_config": DRAFT},
}


OPTIONAL = {"sliding_window", "attention_chunk_size", "q_lora_rank", "v_head_dim", "index_topk"}


# Composites that AutoModelForCausalLM does not have: with a text model that it has, or trained
# themselves.
IMAGE_TEXT = (
    "aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass", "deepseek_vl",
    "exaone4_5", "fast_vlm", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "granite_docling",
    "granite_speech", "hyperclovax_vision_v2", "idefics", "idefics2", "idefics3", "internvl",
    "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "minicpmv4_6", "minimax_m3_vl", "mistral3", "mistral4", "muse_glimmer",
    "ovis2", "paligemma", "perception_lm", "qianfan_ocr", "qwen2_5_omni", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl",
    "qwen3_vl_moe", "smolvlm", "video_llama_3", "video_llava", "vipllava", "voxtral",
)  # fmt: skip


def model_types() -> list[str]:
    """Every model type that AutoModelForCausalLM accepts, and composites that contain one."""
    return sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *IMAGE_TEXT})


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small config of `model_type`."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_small(kind, EXCEPTIONS.get(model_type, {})))


def _small(kind: type[PreTrainedConfig], exceptions: dict[str, Any]) -> dict[str, Any]:
    """Small values for the attributes of `kind`, and of its parts."""
    try:
        usual = kind()
    except Exception:  # the defaults of some parts do not fit together
        usual = kind(**exceptions)
    parts = {
        name: part for name in kind.sub_configs if (part := getattr(usual, name, None)) is not None
    }
    values: dict[str, Any] = {
        name: value
        for name, value in SIZES.items()
        if name in vars(usual) and (name not in OPTIONAL or vars(usual)[name] is not None)
    }
    values |= _layers(usual)
    for name, part in parts.items():
        values[name] = type(part)(**_small(type(part), exceptions.get(name, {})))
    return values | {name: value for name, value in exceptions.items() if name not in parts}


def _layers(usual: PreTrainedConfig) -> dict[str, Any]:
    """One layer of each kind, if the layers of `usual` are of several kinds."""
    lists = {
        name: value
        for name in ("layer_types", "mlp_layer_types", "layers_block_type")
        if name in vars(usual) and isinstance(value := vars(usual)[name], list) and value
    }
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    kinds *= -(-LAYERS // len(kinds))
    small: dict[str, Any] = {
        name: list(column) for name, column in zip(lists, zip(*kinds, strict=True), strict=True)
    }
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if name in vars(usual):
            small[name] = len(kinds)
    return small


def release(model_type: str, folder: Path, seed: int = 1) -> str:
    """Write a random model of `model_type` to `folder`, as its authors would release it; return
    its class. Raises what transformers raises.

    A tower that needs a package which is not installed has one tensor, which no class here builds.
    Of the config of a part, only the config is written.
    """
    config = tiny_config(model_type)
    kind = _released_class(config)
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    try:
        with towers_may_be_absent():
            model = kind(config)
    except (ImportError, AttributeError):
        config.architectures = [kind.__name__]
        config.save_pretrained(folder)
        return kind.__name__
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():  # biases that start at zero
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    if towers := absent_towers(model):
        file = folder / "model.safetensors"
        values = {f"{path}.timm_model.conv.weight": torch.randn(4, 3, 2, 2) for path in towers}
        save_file(load_file(file) | values, file, {"format": "pt"})
    return kind.__name__


def _released_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The composite, where there is one: vision tower, encoder and all."""
    mappings = [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING]
    if config.is_encoder_decoder:
        mappings = [
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
            modeling_auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING,
            *mappings,
        ]
    for mapping in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        *mappings,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(f"{type(config).__name__} has no class")
