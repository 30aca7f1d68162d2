"""Adapters that are not alone: trained on another one, beside another one, on a base whose factors
they began with; and those that no weights can express."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.plan import make_plan
from launcher.export.source import find_source
from tests.helpers.chat import edit
from tests.helpers.exports import make_adapter, merged_by_peft, plan_of, stored
from tests.helpers.released import moved

TARGETS = ["q_proj", "down_proj"]


def values(folder: Path, **where: Any) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.read_all() for tensor in plan_of(folder, **where).tensors}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert not [name for name, each in expected.items() if not torch.equal(found[name], each)]


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


def test_an_adapter_on_an_adapter_is_merged_after_it(tiny_untied: Path, tmp_path: Path) -> None:
    first = make_adapter(tiny_untied, tmp_path / "first", target_modules=TARGETS)
    second = make_adapter(tiny_untied, tmp_path / "second", target_modules=["q_proj", "up_proj"])
    edit(second / "adapter_config.json", base_model_name_or_path=str(first))
    live = PeftModel.from_pretrained(load(tiny_untied), first).merge_and_unload()
    live = PeftModel.from_pretrained(live, second).merge_and_unload()
    assert_same(values(second), dict(live.named_parameters()))
    plan = plan_of(second)
    names = "self_attn.q_proj", "mlp.down_proj", "mlp.up_proj", "self_attn.k_proj"
    actions = [plan.actions[f"model.layers.0.{name}.weight"] for name in names]
    assert actions == [*["merged (LoRA)"] * 3, "copied"]
    assert f"merged into it first: adapter {first}" in find_source(second).describe()
    assert_same(values(second, base=str(tiny_untied)), merged_by_peft(tiny_untied, second))
    replaced = find_source(second, base=str(tiny_untied)).describe()
    assert f"not merged: {first}" in replaced
    assert f"--base {first} merges it first" in replaced
    assert "not merged" not in find_source(second, base=str(first)).describe()
    edit(first / "adapter_config.json", base_model_name_or_path=str(second))
    with pytest.raises(UserError, match="which was trained on this adapter → name the model"):
        plan_of(second)


@pytest.mark.parametrize(
    ("init", "settings"),
    [("pissa", {}), ("pissa_niter_2", {"use_rslora": True}), ("olora", {"lora_alpha": 9})],
)
def test_the_first_factors_of_an_adapter_are_taken_from_it(
    init: str, settings: dict[str, Any], tiny_untied: Path, tmp_path: Path
) -> None:
    """As PEFT converts it. It can be merged only if they were saved."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init, **settings)
    wrapped = get_peft_model(load(tiny_untied), config)
    saved = wrapped.peft_config["default"]
    for folder in ("beside_init", "adapter/inside_init"):
        saved.init_lora_weights = True
        wrapped.save_pretrained(tmp_path / folder)
    saved.init_lora_weights = init
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(tmp_path / "adapter")
    initial = str(tmp_path / "beside_init")
    wrapped.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=initial
    )
    expected = merged_by_peft(tiny_untied, tmp_path / "converted")
    assert_same(values(tmp_path / "adapter"), expected)
    assert "inside_init" not in find_source(tmp_path / "adapter").describe()
    shutil.rmtree(tmp_path / "adapter/inside_init")
    assert_same(values(tmp_path / "adapter"), expected)
    shutil.copytree(tmp_path / "beside_init", tmp_path / "other_init")
    with pytest.raises(UserError, match="may both be the initial factors"):
        plan_of(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "other_init")
    shutil.rmtree(tmp_path / "beside_init")
    reason = "at random" if "niter" in init else f"as {init}_init"
    with pytest.raises(UserError, match=f"{reason}.* path_initial_model_for_weight_conversion"):
        plan_of(tmp_path / "adapter")


def test_one_of_several_adapters_is_chosen_by_its_name(tiny_untied: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = get_peft_model(load(tiny_untied), config, adapter_name="first")
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.1
    wrapped.save_pretrained(tmp_path / "both")
    torch.save(wrapped.state_dict(), tmp_path / "both" / "pytorch_model.bin")
    folder = tmp_path / "adapters"
    shutil.copytree(
        tmp_path / "both", folder, ignore=lambda path, names: [n for n in names if "bin" in n]
    )
    with pytest.raises(UserError, match=r"contains the adapters first, second → .*--adapter-name"):
        plan_of(folder)
    with pytest.raises(UserError, match="no such adapter, but first, second"):
        plan_of(folder, adapter_name="third")
    for name in ("first", "second"):
        expected = merged_by_peft(tiny_untied, folder / name)
        assert_same(values(folder, adapter_name=name), expected)
    with pytest.raises(UserError, match="a single adapter → leave the option out"):
        plan_of(folder / "first", adapter_name="second")
    state = tmp_path / "state"
    state.mkdir()
    shutil.move(tmp_path / "both" / "pytorch_model.bin", state)
    with pytest.raises(UserError, match=r"2 adapters \(first, second\) → choose"):
        plan_of(state, base=str(tiny_untied))
    found = values(state, base=str(tiny_untied), adapter_name="second", alpha=8.0)
    assert_same(found, merged_by_peft(tiny_untied, folder / "second"))


@pytest.mark.parametrize("kind", ["PrefixTuning", "PromptTuning", "PromptEncoder", "XLora"])
def test_an_adapter_that_changes_no_weights_is_refused_with_the_reason(
    kind: str, tiny_untied: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if kind == "XLora":
        lora = make_adapter(tiny_untied, tmp_path / "lora", target_modules=TARGETS)
        settings |= {"hidden_size": 48, "adapters": {"0": str(lora)}}
    else:
        settings["num_virtual_tokens"] = 3
    model = load(tiny_untied)
    model.config.use_cache = False
    get_peft_model(model, getattr(peft, f"{kind}Config")(**settings)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match=r"has peft_type=[A-Z_]+: .* → serve it with PEFT"):
        plan_of(tmp_path / "adapter")


def test_a_saved_embedding_of_a_tied_base_is_merged_beside_its_head(
    tiny: Path, tmp_path: Path
) -> None:
    """PEFT's file also has the head, with the base's values (save_embedding_layers)."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    wrapped = get_peft_model(load(tiny), lora)
    embedding = wrapped.get_input_embeddings()
    embedding.weight.data += torch.randn_like(embedding.weight)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in stored(tmp_path / "adapter")
    found = values(tmp_path / "adapter")
    assert torch.equal(found["lm_head.weight"], stored(tiny)["model.embed_tokens.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], embedding.weight)
    assert plan_of(tmp_path / "adapter").config["tie_word_embeddings"] is False


def test_the_adapter_of_a_checkpoint_is_exported_as_the_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    """With its tokenizer, its new tokens and the ends of its answers."""
    checkpoint = moved("lora-zero3-bf16", tmp_path, tiny) / "checkpoints/step-000005"
    assert find_source(checkpoint / "adapter") == find_source(checkpoint)


def test_adapter_only_writes_one_adapter(tiny_untied: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(tiny_untied, tmp_path / name) for name in ("one", "two")]
    with pytest.raises(UserError, match=r"writes one adapter, and --adapter names 2 → one of them"):
        make_plan(find_source(tiny_untied, adapters=adapters), Options(adapter_only=True))
    with pytest.raises(UserError, match="contains no adapter → leave the option out"):
        make_plan(find_source(tiny_untied), Options(adapter_only=True))
