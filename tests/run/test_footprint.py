"""The estimate of `strategy=auto` against the plan, which runs the training code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from launcher.commands.plan import plan_run
from launcher.config import Config, store
from launcher.model import chunked_loss
from launcher.model.text_part import non_text_modules
from launcher.run.footprint import CHUNK_ELEMENTS, EAGER_TYPES, estimate
from tests.helpers.compose import composed_raw
from tests.helpers.composites import load_composite, make_composite

BAND = (0.97, 1.35)  # of the plan's peak: seldom below it, never far above
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = {
    **SMALL, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


def model(folder: Path, described: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    whole: dict[str, Any] = {
        "model": {"name_or_path": str(folder)},
        "data": {"max_length": 2048},
        "precision": {"name": "bf16"},
        "training": {"max_steps": 1, "global_batch_size": 8},
        "cluster": {"nproc_per_node": 4},
    }
    for name, values in sections.items():
        whole[name] = {**whole.get(name, {}), **values}
    return store.build(composed_raw(**whole))


@pytest.mark.parametrize(("strategy", "method"), [("ddp", "lora"), ("fsdp", "full")])
def test_the_estimate_is_a_little_above_the_plan(
    tmp_path: Path, strategy: str, method: str
) -> None:
    folder = model(tmp_path, SMALL)
    config = config_of(folder, strategy={"name": strategy}, method={"name": method})
    footprint = estimate(config, folder)
    assert footprint is not None
    estimated = footprint.complete() if strategy == "ddp" else footprint.sharded(4)
    planned = plan_run(config).peak
    assert BAND[0] < estimated / planned < BAND[1]


# Peaks of `shardway plan`, 2026-11-30: Llama-3.2-1B's shape, 2,048 tokens, 8 ranks, strategy=ddp.
PLANNED = [
    ({"method": {"name": "lora"}}, 6.42),
    ({"method": {"name": "full"}}, 29.01),
    ({"method": {"name": "full"}, "precision": {"name": "fp32"}}, 34.02),
    ({"method": {"name": "qlora"}}, 4.98),
    ({"method": {"name": "full"}, "training": {"activation_checkpointing": "full"}}, 25.59),
]


@pytest.mark.parametrize(("sections", "gigabytes"), PLANNED)
def test_a_real_size_is_estimated_as_it_was_planned(
    tmp_path: Path, sections: dict[str, Any], gigabytes: float
) -> None:
    folder = model(tmp_path, LLAMA_1B)
    footprint = estimate(config_of(folder, **sections), folder)
    assert footprint is not None
    assert BAND[0] < footprint.complete() / (gigabytes * 1e9) < BAND[1]


EXPERTS = {
    **SMALL, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
SMALL_EXPERTS = {
    **SMALL, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
}  # fmt: skip


# Peaks of `shardway plan`, 2026-11-30: adapters on the shapes of Mixtral-8x7B and Qwen3-30B-A3B,
# 4,096 tokens, recomputed, 8 ranks.
@pytest.mark.parametrize(
    ("described", "sharded", "complete"), [(EXPERTS, 23.26, 98.39), (SMALL_EXPERTS, 14.60, 68.63)]
)
def test_experts_are_estimated_as_they_were_planned(
    tmp_path: Path, described: dict[str, Any], sharded: float, complete: float
) -> None:
    folder = model(tmp_path, described)
    recomputed = {"activation_checkpointing": "full", "global_batch_size": 64}
    asked = config_of(folder, data={"max_length": 4096}, training=recomputed)
    footprint = estimate(asked, folder)
    assert footprint is not None
    assert BAND[0] < footprint.sharded(8) / (sharded * 1e9) < BAND[1]
    assert BAND[0] < footprint.complete() / (complete * 1e9) < BAND[1]


def test_shapes_come_from_the_files_where_they_are(tiny: Path) -> None:
    config = config_of(tiny, method={"name": "full"}, data={"max_length": 8})
    footprint = estimate(config, tiny)
    assert footprint is not None
    # 61,056 - 11,520 parameters, each with a master, a gradient, two moments and a working copy.
    assert footprint.replica == 49_536 * (4 + 4 + 8 + 2)
    assert footprint.shared == 49_536 * (4 + 4 + 8)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_towers_of_a_composite_are_frozen(name: str, tmp_path: Path) -> None:
    folder = make_composite(name, tmp_path)
    composite = load_composite(name, folder)
    beside = non_text_modules(composite)
    frozen = sum(each.numel() for module in beside for each in module.parameters())
    frozen += 64  # of a head in the files that no class builds
    trained = sum(each.numel() for each in composite.parameters()) + 64 - frozen
    footprint = estimate(config_of(folder, method={"name": "full"}), folder)
    assert footprint is not None
    assert footprint.shared == trained * (4 + 4 + 8) + frozen * 2
    few = {"name": "lora", "target_modules": ["q_proj"], "rank": 2}
    adapted = estimate(config_of(folder, method=few), folder)
    assert adapted is not None
    adapters = 2 * sum(
        sum(each.weight.shape)
        for path, each in composite.named_modules()
        if path.endswith("q_proj") and not any(part in path for part in ("vision", "visual"))
    )
    assert adapted.shared == (trained + frozen) * 2 + adapters * (4 + 4 + 8)


# Peaks of `shardway plan`, 2026-12-01: 8 layers, 2,048 tokens, 4 ranks, strategy=ddp method=lora.
EAGER = {**SMALL, "hidden_size": 1024, "num_key_value_heads": 4}
GEMMA2 = {"intermediate_size": 4096, "head_dim": 128, "tie_word_embeddings": True}
GPT_OSS = {"intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 16,
           "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "sizes", "gigabytes"), [("gemma2", GEMMA2, 4.42), ("gpt_oss", GPT_OSS, 3.05)]
)
def test_scores_are_counted_where_a_family_has_only_eager_attention(
    tmp_path: Path, kind: str, sizes: dict[str, Any], gigabytes: float
) -> None:
    folder = model(tmp_path, {**EAGER, **sizes, "model_type": kind})
    footprint = estimate(config_of(folder, method={"name": "lora"}), folder)
    assert footprint is not None
    assert BAND[0] < footprint.complete() / (gigabytes * 1e9) < BAND[1]


@pytest.mark.whole
def test_the_families_without_another_attention_are_those_of_transformers() -> None:
    found = set()
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for kind, name in (pair for mapping in mappings for pair in mapping.items()):
        built = getattr(transformers, name, None)
        if built is None or built._supports_sdpa:
            continue
        described = transformers.CONFIG_MAPPING[kind]()
        heads = getattr(described.get_text_config(decoder=True), "num_attention_heads", None)
        found |= {kind} if heads and not described.is_encoder_decoder else set()
    assert found == EAGER_TYPES


def test_more_ranks_need_less_and_longer_rows_more(tmp_path: Path) -> None:
    folder = model(tmp_path, LLAMA_1B)
    config = config_of(folder, method={"name": "full"})
    short = estimate(config, folder)
    rows = dataclasses.replace(config.data, max_length=8192)
    long = estimate(dataclasses.replace(config, data=rows), folder)
    assert short is not None
    assert long is not None
    assert short.sharded(64) < short.sharded(8) < short.complete() < long.complete()


def test_a_model_that_does_not_say_its_sizes_has_no_estimate(tmp_path: Path) -> None:
    assert estimate(config_of(tmp_path), model(tmp_path, {"model_type": "mine"})) is None


def test_a_chunk_of_logits_is_that_of_the_loss() -> None:
    assert CHUNK_ELEMENTS == chunked_loss.CHUNK_ELEMENTS
