"""Adapters of models whose experts transformers 5 fuses, trained when each was a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.merge.target_parameters import REGISTRATION_ORDER
from launcher.io.model_class import causal_class, meta_model
from tests.helpers import tiny_models
from tests.helpers.merging import assert_equal, by_peft, merged, model

FAMILIES = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 24),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 80),
}


def of_transformers_4(folder: Path, kind: str, **settings: Any) -> Path:
    """An adapter as transformers 4 and PEFT saved it. Neither can be installed beside today's, so
    that the file is written after their names and shapes."""
    from peft import LoraConfig

    block, (gate, up, down), inner = FAMILIES[kind]
    rank = 6
    torch.manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, outputs: int, inputs: int) -> None:
        key = f"base_model.model.model.layers.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs) * 0.2
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank) * 0.2

    for layer in range(2):
        add(f"{layer}.self_attn.q_proj", 32, 32)
        add(f"{layer}.{block}.gate", 4, 32)
        for expert in range(4):
            for name, shape in ((gate, (inner, 32)), (up, (inner, 32)), (down, (32, inner))):
                add(f"{layer}.{block}.experts.{expert}.{name}", *shape)
    targets = ["q_proj", "gate", gate, up, down]
    LoraConfig(
        r=rank, lora_alpha=10, target_modules=targets, task_type="CAUSAL_LM", **settings
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_of_single_experts_merge_as_peft_fuses_them(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = of_transformers_4(tmp_path / "adapter", kind)
    result = merged(model(kind, dtype), folder)
    assert_equal(result, by_peft(model(kind, dtype), folder))
    experts = [name for name, action in result.actions.items() if "experts" in action]
    assert len(experts) == 4, "two fused weights in each of two layers"


def test_the_slow_implementation_agrees(tmp_path: Path) -> None:
    folder = of_transformers_4(tmp_path / "adapter", "qwen3_moe")
    tensor = merged(model("qwen3_moe"), folder).tensors["model.layers.0.mlp.experts.gate_up_proj"]
    exact = tensor.reference(30, 90)
    torch.testing.assert_close(tensor.read(30, 90).double(), exact, atol=1e-6, rtol=1e-6)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = of_transformers_4(tmp_path / "adapter", "qwen3_moe")
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: tensor
        for name, tensor in load_file(file).items()
        if "layers.1.mlp.experts.2.up_proj" not in name
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="expert 2 has no w3 or up_proj"):
        merged(model("qwen3_moe"), folder)


def test_a_scale_that_fusing_would_change_is_refused(tmp_path: Path) -> None:
    folder = of_transformers_4(tmp_path / "adapter", "mixtral", use_rslora=True)
    with pytest.raises(UserError, match="use_rslora"):
        merged(model("mixtral"), folder)


def test_dora_on_single_experts_is_refused(tmp_path: Path) -> None:
    folder = of_transformers_4(tmp_path / "adapter", "qwen3_moe", use_dora=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        if name.endswith(".lora_B.weight"):
            magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[magnitude] = torch.ones(tensors[name].shape[0])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"experts\.0\.gate_proj was trained with DoRA"):
        merged(model("qwen3_moe"), folder)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in ("nemotron_h", "gpt_oss") else pytest.mark.whole)
        for name in tiny_models.model_types()
    ],
)
def test_the_parameters_of_experts_are_registered_in_the_known_order(model_type: str) -> None:
    """PEFT's wrappers of a module are nested in the order in which its parameters are registered,
    and the names in its files do not show which is which."""
    try:
        config = tiny_models.tiny_config(model_type).get_text_config(decoder=True)
        model = meta_model(causal_class(config), config)
    except Exception as error:
        pytest.skip(f"cannot be built: {error}")
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        known = [name for name in REGISTRATION_ORDER if name in names]
        if len(known) == len(names):
            assert names == known, path
