"""The text model of a composite: alone, with an adapter, or refused if it could not be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.chat.model import ChatModel
from launcher.chat.target import find_target
from launcher.errors import UserError
from launcher.export.exportable import check_exportable
from tests.helpers.composites import TEXT, load_composite, make_composite
from tests.helpers.exports import consolidate, stored

TEXT_MODELS = {
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
}
ENDINGS = ["q_proj", "v_proj"]  # that modules of a vision tower of llama4 have, too


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("composites")
    return {name: make_composite(name, folder / name) for name in (*TEXT_MODELS, "mllama")}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40).view(1, -1)).logits
    return found


def make_adapter(model: Any, folder: Path, **options: Any) -> Any:
    """The model with an adapter of random values, which is saved in `folder`."""
    options = {"target_modules": ENDINGS, **options}
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_text_model_alone_computes_the_same(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    consolidate(bases[name], "--text-only", "--output", tmp_path / "text")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", output_loading_info=True, dtype="auto"
    )
    assert type(model).__name__ == TEXT_MODELS[name]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(load_composite(name, bases[name])))
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "text").keys()
    check_exportable(tmp_path / "text")


def test_a_folder_without_a_text_model_of_its_own_is_refused(
    bases: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    other = r"--text-only: .* is not a composite whose text model"
    text = r"is a text model already \(LlamaForCausalLM\) → without --text-only"
    for folder, message in ((bases["mllama"], other), (tiny, text)):
        with pytest.raises(UserError, match=message):
            consolidate(folder, "--text-only", "--output", tmp_path / "text")
    with pytest.raises(UserError, match="--adapter-only writes an adapter and --text-only a model"):
        consolidate(tiny, "--text-only", "--adapter-only", "--output", tmp_path / "text")


@pytest.mark.parametrize("name", ["qwen3_5", "llama4"])
def test_an_adapter_of_the_text_model_becomes_one_of_the_composite(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """As earlier versions saved it: by the names of the class that AutoModelForCausalLM picks."""
    base, text = bases[name], tmp_path / "text-adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = make_adapter(model, text, rank_pattern={"layers.1.self_attn.q_proj": 2})
    expected = logits(wrapped)
    consolidate(text, "--base", base, "--output", tmp_path / "merged")
    assert torch.allclose(logits(load_composite(name, tmp_path / "merged")), expected, atol=1e-5)
    consolidate(text, "--adapter-only", "--output", tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load_composite(name, base), tmp_path / "adapter")
    assert torch.allclose(logits(adapted), expected, atol=1e-5)
    names = {key.replace(".default", "") for key in adapted.state_dict() if "lora_" in key}
    assert names == load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert isinstance(settings["target_modules"], list)  # SGLang reads nothing else
    consolidate(tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged-again")
    merged, again = stored(tmp_path / "merged"), stored(tmp_path / "merged-again")
    assert all(torch.equal(merged[key], tensor) for key, tensor in again.items())


def test_an_adapter_of_the_composite_is_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    """Made by PEFT, with LoRA in the vision tower, too."""
    model = load_composite("llama4", bases["llama4"])
    expected = logits(make_adapter(model, tmp_path / "adapter"))
    consolidate(tmp_path / "adapter", "--base", bases["llama4"], "--output", tmp_path / "out")
    assert torch.allclose(logits(load_composite("llama4", tmp_path / "out")), expected, atol=1e-5)
    before, after = stored(bases["llama4"]), stored(tmp_path / "out")
    changed = {key for key, tensor in after.items() if not torch.equal(before[key], tensor)}
    assert any(key.startswith("vision_model.") for key in changed)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "llama4"])
def test_paths_of_expert_parameters_become_those_of_the_composite(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """PEFT looks up ranks by the parameter, not by the module that it wraps."""
    model = AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    paths = [path for path, _ in model.named_parameters() if path.endswith("gate_up_proj")]
    down = paths[0].removesuffix("gate_up_proj") + "down_proj"
    wrapped = make_adapter(
        model,
        tmp_path / "text",
        target_parameters=[paths[0], "experts.down_proj"],
        rank_pattern={down: 2, "experts.gate_up_proj": 3},
        alpha_pattern={"experts.down_proj": 5},
        modules_to_save=["self_attn.o_proj"],
    )
    expected = logits(wrapped)
    consolidate(tmp_path / "text", "--base", bases[name], "--output", tmp_path / "merged")
    assert torch.allclose(logits(load_composite(name, tmp_path / "merged")), expected, atol=1e-5)
    base = ("--base", bases[name])
    consolidate(tmp_path / "text", *base, "--adapter-only", "--output", tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load_composite(name, bases[name]), tmp_path / "adapter")
    assert torch.allclose(logits(adapted), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen3_5", "text"), ("qwen3_5", "composite"), ("mistral3", "composite")],
)
def test_one_can_chat_with_either_adapter(
    bases: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    base = bases[name]
    model = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if kind == "text"
        else load_composite(name, base)
    )
    expected = logits(make_adapter(model, tmp_path / "adapter"))
    talk = ChatModel(find_target(tmp_path / "adapter", base))
    assert torch.allclose(logits(talk.model), expected, atol=1e-4)


def test_an_embedding_with_rows_for_images_is_no_resized_vocabulary(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Llama 3.2 Vision: exported without its base, too."""
    state = load_composite("mllama", bases["mllama"]).state_dict()
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp")
    shutil.copy(bases["mllama"] / "config.json", tmp_path / "dcp")
    consolidate(tmp_path / "dcp", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 259


def test_a_head_that_no_class_builds_is_copied_into_a_full_run(tmp_path: Path) -> None:
    """As in the files of DeepSeek-V3 and GLM-4.5: a head for two tokens at once."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    extra = {"model.layers.2.eh_proj.weight": torch.randn(8, 8), "mtp.steps": torch.arange(3)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    for parameter in model.parameters():
        parameter.data += 0.5
    dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=tmp_path / "dcp")
    consolidate(tmp_path / "dcp", "--base", tmp_path / "base", "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()} | extra
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_what_could_not_be_exported_is_refused_before_training(
    tmp_path: Path,
) -> None:
    for folder, sentence in (
        (_without_text(tmp_path / "vit"), "ViTModel is not a causal language model → a model that"),
        (_encoder_decoder(tmp_path / "t5"), "T5ForConditionalGeneration is an encoder-decoder"),
        (
            _without_head(tmp_path / "llama"),
            "LlamaForCausalLM, which would be trained, is not p",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            check_exportable(folder)


def test_a_folder_without_its_tied_head_is_exported_by_its_own_names(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "base")
    check_exportable(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = make_adapter(model, tmp_path / "adapter", target_modules=["c_attn"])
    consolidate(tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "base").keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(trained), atol=1e-5)


def test_files_of_other_names_than_transformers_writes_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["qwen3_5_moe"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if ".experts." in name)
    tensors[name.replace(".experts.", ".odd.")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="could not be exported after training"):
        check_exportable(folder)


def _encoder_decoder(folder: Path) -> Path:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _without_text(folder: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=4, patch_size=2,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    return folder


def _without_head(folder: Path) -> Path:
    transformers.LlamaModel(transformers.LlamaConfig(**TEXT)).save_pretrained(folder)
    return folder
