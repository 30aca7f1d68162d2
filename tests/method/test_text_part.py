"""Towers of a composite that is trained whole: no text reaches them, and nothing trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.config.schema.method import FreezeConfig, FullConfig, LoraConfig
from launcher.errors import UserError
from launcher.folders.adapter import WEIGHTS
from launcher.method import build_method
from launcher.model.text_part import non_text_paths
from tests.helpers.tiny_models import tiny_config

TOWERS = {
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "fuyu": {"model.vision_embed_tokens"},
    "moss_transcribe_diarize": {"model.audio_tower", "model.multi_modal_projector"},
    "phi4_multimodal": {"model.embed_tokens_extend"},
    "llama": set[str](),
    "qwen3_5_moe": set[str](),
}


def build(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)


@pytest.mark.parametrize("model_type", TOWERS)
def test_what_full_does_not_train_has_no_gradient(model_type: str) -> None:
    model = build(model_type)
    assert set(non_text_paths(model)) == TOWERS[model_type]
    model(input_ids=torch.arange(3, 40).view(1, -1)).logits.square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    method = build_method(FullConfig(name="full"))
    method.prepare(model, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == reached
    assert method.is_partial == bool(TOWERS[model_type])


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_full_does_not_train_what_computes_without_gradients(model_type: str) -> None:
    """Weight decay would change it under ZeRO, and not under FSDP2."""
    model = build(model_type)
    model(input_ids=torch.arange(3, 40).view(1, -1)).logits.square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    method = build_method(FullConfig(name="full"))
    method.prepare(model, 0)
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if parameters[name].requires_grad} == reached
    assert {name for name in parameters if ".indexer." in name} == parameters.keys() - reached
    assert method.is_partial


@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
def test_an_adapter_is_one_of_the_text_model(targets: str) -> None:
    model = build("gemma3")
    assert any(name.startswith("model.vision_tower") for name in paths_of(model, "q_proj"))
    wrapped = build_method(LoraConfig(name="lora", target_modules=[targets])).prepare(model, 0)
    adapted = [name for name, each in wrapped.named_modules() if isinstance(each, LoraLayer)]
    assert adapted
    assert not [name for name in adapted if "vision" in name or "projector" in name]


def test_a_module_of_a_tower_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"fc1 is only in model\.vision_tower.* text does not pass"):
        build_method(LoraConfig(name="lora", target_modules=["fc1"])).prepare(build("gemma3"), 0)


@pytest.mark.parametrize("place", ["vision_tower", "language_model"])
def test_an_adapter_that_earlier_versions_gave_to_a_tower_is_left_out(
    tmp_path: Path, place: str
) -> None:
    method = build_method(LoraConfig(name="lora", target_modules=["q_proj"]))
    model = method.prepare(build("gemma3"), 0)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    method.write(model, trained, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    extra = {f"base_model.model.model.{place}.layers.0.fc1.lora_A.weight": torch.ones(2, 2)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    if place == "vision_tower":
        assert method.read(model, tmp_path / "adapter").keys() == trained.keys()
    else:
        with pytest.raises(UserError, match="contains a different adapter"):
            method.read(model, tmp_path / "adapter")


def paths_of(model: torch.nn.Module, name: str) -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith(f".{name}")]


@pytest.mark.parametrize("name", ["vision_tower", "multi_modal_projector", "fc1"])
def test_training_a_tower_in_full_is_refused(name: str) -> None:
    says = rf"{name} is only in model\.\S*{name}, which text does not pass through.* → modules of"
    model = build("gemma3")
    lora = LoraConfig(name="lora", target_modules=["q_proj"], modules_to_save=[name])
    with pytest.raises(UserError, match=f"^method.modules_to_save: {says}"):
        build_method(lora).prepare(model, 0)
    freeze = FreezeConfig(name="freeze", layers=1, extra_modules=[name])
    with pytest.raises(UserError, match=f"^method.extra_modules: {says}"):
        build_method(freeze).prepare(build("gemma3"), 0)


@pytest.mark.parametrize("name", ["model", "q_proj"])
def test_freeze_trains_no_tower_inside_a_module_or_of_the_same_name(name: str) -> None:
    """`model` contains the tower."""
    model = build("gemma3")
    modules = {"extra_modules": ["model"]} if name == "model" else {"modules": ["q_proj"]}
    build_method(FreezeConfig(name="freeze", layers=1, **modules)).prepare(model, 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("language_model" in name or name.startswith("lm_head") for name in trained)


def test_a_module_of_the_text_model_is_trained_in_full_without_its_namesake_of_a_tower(
    tmp_path: Path,
) -> None:
    model = build("gemma3")
    assert [path for path in paths_of(model, "k_proj") if path.startswith("model.vision_tower")]
    config = LoraConfig(name="lora", target_modules=["q_proj"], modules_to_save=["k_proj"])
    method = build_method(config)
    wrapped = method.prepare(model, 0)
    trained = {name: p.detach() for name, p in wrapped.named_parameters() if p.requires_grad}
    full = [name for name in trained if "modules_to_save" in name]
    assert len(full) == len([p for p in paths_of(build("gemma3"), "k_proj") if "language" in p])
    assert all("language_model" in name for name in full)
    method.write(wrapped, trained, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("gemma3"), str(tmp_path / "adapter"))
    values = dict(loaded.named_parameters())
    assert all(torch.equal(values[name], value) for name, value in trained.items())
