"""Write a model folder with random weights, for benchmarks that cannot download a model.

    python tools/random_model.py 8b ~/random-8b        shape of Llama-3-8B, 16 GB of bf16
    python tools/random_model.py 1b ~/random-1b        shape of Llama-3.2-1B, 3 GB of bf16
    python tools/random_model.py tiny_moe ~/tiny-moe   GLM-4-MoE: with experts and buffers

The tokenizer has one token for each byte. The vocabulary still has the size that the shape defines.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
    "tiny_moe": {  # multiples of 16, which the grouped products on GPUs need
        "model_type": "glm4_moe",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
}
SHARD_BYTES = 5_000_000_000
PATTERN_VALUES = 1 << 24  # random values that the weights repeat: seconds, not minutes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.folder)


def config_of(shape: str) -> PreTrainedConfig:
    """The config of a shape, with untied embeddings, as in Llama-3-8B."""
    return AutoConfig.for_model(
        **SHAPES[shape],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def make(shape: str, folder: Path, shard_bytes: int = SHARD_BYTES, seed: int = 0) -> None:
    """Write config.json, tokenizer, bf16 shards of at most `shard_bytes`, and finally an index.

    One shard is in memory at a time; a model with experts is small and made as a whole, because
    transformers splits its experts when it writes. Raises UserError if `folder` is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    byte_tokenizer().save_pretrained(folder)
    if config.model_type != "llama":
        torch.manual_seed(seed)
        whole = AutoModelForCausalLM.from_config(config)
        whole.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_bytes)
        return
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards = split(sizes, shard_bytes)
    torch.manual_seed(seed)
    pattern = torch.randn(PATTERN_VALUES).mul_(0.02).bfloat16()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weight(name, sizes[name], pattern) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * math.prod(shape) for shape in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def split(sizes: dict[str, torch.Size], shard_bytes: int) -> list[list[str]]:
    """The names of each shard, in order. A tensor larger than a shard gets its own shard."""
    shards: list[list[str]] = [[]]
    remaining = shard_bytes
    for name, shape in sizes.items():
        if shards[-1] and 2 * math.prod(shape) > remaining:
            shards.append([])
            remaining = shard_bytes
        shards[-1].append(name)
        remaining -= 2 * math.prod(shape)
    return shards


def _weight(name: str, shape: torch.Size, pattern: torch.Tensor) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    count = math.prod(shape)
    return pattern.repeat(-(-count // len(pattern)))[:count].reshape(shape).clone()


if __name__ == "__main__":
    main()
