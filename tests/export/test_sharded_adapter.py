"""The export contains all trained tensors of a sharded adapter, with or without its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from launcher.errors import UserError
from tests.helpers.exports import consolidate, plan_of, stored


def whole(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def trained_alone(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def as_peft_names_it(model: Any) -> dict[str, torch.Tensor]:
    return dict(get_peft_model_state_dict(model, save_embedding_layers=True))


FORMS: list[Callable[[Any], dict[str, torch.Tensor]]] = [whole, trained_alone, as_peft_names_it]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "norms": {},
    "dora": {"use_dora": True},
}


def train(base: Path, kind: str) -> Any:
    """A PEFT model whose trained parameters have all changed."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **KINDS[kind]}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    if kind == "norms":
        for name, parameter in wrapped.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    return wrapped


@pytest.fixture
def save(tmp_path: Path, tiny_untied: Path) -> Callable[..., Path]:
    def saved(model: Any, form: Callable[[Any], dict[str, torch.Tensor]]) -> Path:
        folder = tmp_path / "checkpoint"
        dcp.save({"model": form(model)}, checkpoint_id=folder / "pytorch_model_fsdp_0")
        model.peft_config["default"].base_model_name_or_path = str(tiny_untied)
        model.peft_config["default"].save_pretrained(folder)
        return folder / "pytorch_model_fsdp_0"

    return saved


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_was_trained_is_in_the_export(
    tiny_untied: Path, tmp_path: Path, save: Any, kind: str, form: Any
) -> None:
    if kind == "norms" and form is as_peft_names_it:
        pytest.skip("PEFT leaves such parameters out of what it saves")
    model = train(tiny_untied, kind)
    source = save(model, form)
    consolidate(source, "--output", tmp_path / "out", "--dtype", "fp32")
    found = stored(tmp_path / "out")
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", ["plain", "saved-head", "tokens"])
def test_an_extracted_adapter_contains_everything_trained(
    tiny_untied: Path, tmp_path: Path, save: Any, kind: str, form: Any
) -> None:
    model = train(tiny_untied, kind)
    consolidate(save(model, form), "--output", tmp_path / "adapter", "--adapter-only")
    base = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_exported_too(tmp_path: Path, bias: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=30, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)
    options = {"target_modules": ["q_proj"], "bias": bias}
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), LoraConfig(r=2, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.25
    dcp.save({"model": whole(model)}, checkpoint_id=tmp_path / "dcp")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.peft_config["default"].save_pretrained(tmp_path / "dcp")
    consolidate(tmp_path / "dcp", "--output", tmp_path / "out")
    consolidate(tmp_path / "dcp", "--output", tmp_path / "adapter", "--adapter-only")
    again = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found, taken_out = stored(tmp_path / "out"), again.merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(taken_out[name], tensor, rtol=0, atol=1e-6)


def test_a_resized_vocabulary_is_kept(tiny_untied: Path, tmp_path: Path, save: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.float32)
    model.resize_token_embeddings(280)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    consolidate(save(wrapped, whole), "--output", tmp_path / "out")
    assert stored(tmp_path / "out")["lm_head.weight"].shape[0] == 280
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 280


def test_tensors_that_the_base_cannot_take_are_listed(tiny_untied: Path, save: Any) -> None:
    model = train(tiny_untied, "plain")
    source = save(model, lambda m: whole(m) | {"base_model.model.value_head.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"does not have \(value_head\.weight\)"):
        plan_of(source)
