"""Small models of many architectures: the transformers class and its configuration."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MOE = TEXT | {"moe_intermediate_size": 8, "num_experts": 12, "num_experts_per_tok": 2}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", TEXT | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE),
    "mixtral": ("MixtralForCausalLM", TEXT | {"num_local_experts": 3}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        TEXT
        | {"num_key_value_heads": 4, "moe_intermediate_size": 8, "n_routed_experts": 4}
        | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        | {"v_head_dim": 8},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**TEXT, "intermediate_size": 64}),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": VISION | {"intermediate_size": 24, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": MOE | {"rope_parameters": ROPE},
            "vision_config": VISION | {"intermediate_size": 24, "deepstack_visual_indexes": [0]},
        },
    ),
    "nomic_bert": ("NomicBertModel", TEXT),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP},
    ),
}
