"""Small models of many kinds, adapters on them, and how PEFT and Shardway merge these."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launcher.export.merge import Merged, merge, read_adapter
from launcher.io.tensor import Tensor, in_memory
from tests.helpers.tiny_models import tiny_config

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
WIDE = {"num_hidden_layers": 1, "vocab_size": 1001}


@functools.cache
def _model(kind: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    made = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        "llama_bias": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
        ),
        "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, tie_word_embeddings=False)),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **MOE)),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        ),
        "gpt_oss": lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(
                **{**SIZES, "intermediate_size": 32},
                num_local_experts=4,
                num_experts_per_tok=2,
                head_dim=8,
            )
        ),
        "nemotron_h": lambda: tf.NemotronHForCausalLM(tiny_config("nemotron_h")),
        "wide": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**{**SIZES, **WIDE, "hidden_size": 512, "intermediate_size": 1408})
        ),
        "wide gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=1001, n_embd=384, n_layer=1, n_head=4, n_positions=64)
        ),
        "llava": lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
                vision_config=tf.CLIPVisionConfig(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=16,
                    patch_size=8,
                ),
                tie_word_embeddings=True,
            )
        ),
    }[kind]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A new copy of the model, always with the same weights."""
    return copy.deepcopy(_model(kind)).to(dtype)


def trained(
    folder: Path, kind: str, prepare: Callable[[Any], Any] = lambda model: model, **settings: Any
) -> Path:
    """An adapter folder as save_pretrained writes it, with random trainable values."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 6, "lora_alpha": 10, "task_type": "CAUSAL_LM", **settings}
    peft_model = get_peft_model(prepare(model(kind)), LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean="magnitude" in name, std=0.2)
    peft_model.save_pretrained(folder)
    return folder


def in_dtype(adapter: Path, dtype: torch.dtype, folder: Path) -> Path:
    folder.mkdir()
    file = "adapter_model.safetensors"
    values = {name: tensor.to(dtype) for name, tensor in load_file(adapter / file).items()}
    save_file(values, folder / file, {"format": "pt"})
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


def tensors_of(live: Any) -> dict[str, Tensor]:
    """As a reader returns them: without a tied head."""
    state = live.state_dict()
    if live.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return {name: in_memory(name, tensor, Path("base")) for name, tensor in state.items()}


def merged(live: Any, *adapters: Path, **options: Any) -> Merged:
    config = json.loads(live.config.to_json_string(use_diff=False))
    config["architectures"] = [type(live).__name__]
    return merge(tensors_of(live), config, [read_adapter(each) for each in adapters], **options)


def by_peft(live: Any, *adapters: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    for adapter in adapters:
        live = PeftModel.from_pretrained(live, adapter).merge_and_unload()
    state: dict[str, torch.Tensor] = live.state_dict()
    return state


def assert_equal(result: Merged, expected: dict[str, torch.Tensor]) -> None:
    different = [
        name
        for name, tensor in result.tensors.items()
        if tensor.dtype != expected[name].dtype
        or not torch.equal(tensor.read_all(), expected[name])
    ]
    assert not different, f"{len(different)} of {len(expected)}: {different[:3]}"
