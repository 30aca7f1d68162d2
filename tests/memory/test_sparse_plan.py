"""The plan runs the forward of adapters of experts: they need little more than others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.commands.plan import plan_run
from launcher.config import store
from tests.helpers.compose import composed_raw

QWEN = {  # Qwen3-30B-A3B with two of its 48 layers, and a small vocabulary
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "head_dim": 128, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 1024, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.whole
def test_adapters_of_experts_need_little_more_than_those_of_the_attention(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    peaks = []
    for targets in (ATTENTION, ["all-linear"]):
        raw = composed_raw(
            model={"name_or_path": str(tmp_path)},
            data={"max_length": 4096},
            method={"name": "lora", "rank": 16, "target_modules": targets},
            strategy={"name": "fsdp"},
            precision={"name": "bf16"},
            training={"max_steps": 1, "global_batch_size": 8},
            cluster={"nproc_per_node": 8},
        )
        peaks.append(plan_run(store.build(raw)).peak)
    assert peaks[1] < 1.15 * peaks[0]
