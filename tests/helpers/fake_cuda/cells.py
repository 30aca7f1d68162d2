"""Strategies × methods × options × models: the steps that docs/communication.md describes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.fake_cuda import Case

SIZES: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "mixtral": {
        "model_type": "mixtral",
        **SIZES,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "glm4_moe": {  # has a buffer that is saved
        "model_type": "glm4_moe",
        **SIZES,
        "moe_intermediate_size": 512,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}

# As for a model of 8 billion parameters, whose layers are larger than these buckets and which
# DeepSpeed frees between forward and backward.
BUCKETS = ("strategy.prefetch_bucket_size=3_000_000", "strategy.reduce_bucket_size=3_000_000")
FREED = "{zero_optimization:{stage3_max_live_parameters:0,stage3_max_reuse_distance:0}}"
ZERO3 = (*BUCKETS, f"strategy.extra={FREED}")
STRATEGIES: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": (),
    "fsdp": (),
    "hsdp": (),
    "fsdp_offload": (),
    "zero1": (),
    "zero2": (),
    "zero2_offload": (),
    "zero3": ZERO3,
    "zero3_offload": ZERO3,
}
METHODS = ("full", "lora", "qlora")
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "packed": ("data.packing=true",),
    "recomputed": ("training.activation_checkpointing=full",),
    "fp16": ("precision=fp16",),
    "8-bit": ("optimizer=adamw_8bit",),
}


class Cell(NamedTuple):
    """One value for each axis."""

    strategy: str
    method: str
    option: str = "plain"
    model: str = "llama"

    def __str__(self) -> str:
        return "-".join(self)

    def case(self, models: Path) -> Case:
        """The case, with its model in a folder of `models`: see `write_models`."""
        words = (*STRATEGIES[self.strategy], *OPTIONS[self.option])
        return Case(
            str(models / self.model),
            (f"strategy={self.strategy}", f"method={self.method}", *words),
            ranks=1 if self.strategy == "single" else 8,
            ranks_per_node=4 if self.strategy == "hsdp" else 8,
        )


def options_of(strategy: str) -> tuple[str, ...]:
    """The options that the rules allow with a strategy."""
    return tuple(o for o in OPTIONS if o != "8-bit" or not strategy.startswith("zero"))


GRID = [
    Cell(strategy, method, option, model)
    for strategy, method, model in itertools.product(STRATEGIES, METHODS, MODELS)
    for option in options_of(strategy)
]


def write_models(folder: Path) -> None:
    """A folder for each of MODELS, which contains only config.json."""
    for name, settings in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings))
