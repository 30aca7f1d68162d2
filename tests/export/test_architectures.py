"""Adapters and full runs of many architectures give the files that transformers itself saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from launcher.export.assembled import SAME_NAMES
from launcher.export.exportable import check_exportable
from launcher.export.names import find_naming, kept_in_fp32
from launcher.io.readers.safetensors_file import read_header
from tests.helpers.architectures import MODELS
from tests.helpers.exports import consolidate, stored

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 16, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 30, "pad_token_id": 0}
ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "qwen2": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "gpt_neox": {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
    "qwen3_moe": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "mixtral": {
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "llava": {"target_modules": ["q_proj", "gate_proj"]},
}
TINY = MODELS | {"qwen2": ("Qwen2ForCausalLM", SMALL)}


def random_model(name: str) -> Any:
    kind, settings = TINY[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(2)
    return model_class(model_class.config_class(**settings)).bfloat16().eval()


def load(name: str, folder: Path) -> Any:
    return getattr(transformers, TINY[name][0]).from_pretrained(folder, dtype="auto").eval()


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 25).view(1, -1)).logits


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    random_model(request.param).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "base"), [(n, n) for n in ADAPTERS], indirect=["base"])
def test_an_adapter_is_merged_into_the_files_of_the_base(
    name: str, base: Path, tmp_path: Path
) -> None:
    wrapped = get_peft_model(load(name, base), LoraConfig(r=2, lora_alpha=6, **ADAPTERS[name]))
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(load(name, base), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    consolidate(
        *(base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"),
        *("--max-shard-size", "10KB"),
    )
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "peft")
    assert found.keys() == expected.keys() == stored(base).keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert torch.equal(answer(load(name, tmp_path / "out")), answer(merged))


@pytest.mark.parametrize(
    ("name", "base"), [(n, n) for n in ADAPTERS if n != "llava"], indirect=["base"]
)
def test_a_full_run_gets_the_tensor_names_of_the_base(
    name: str, base: Path, tmp_path: Path
) -> None:
    model = load(name, base)
    for parameter in model.parameters():
        parameter.data += 0.5
    dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=tmp_path / "dcp")
    model.config.save_pretrained(tmp_path / "dcp")
    model.save_pretrained(tmp_path / "itself")
    consolidate(tmp_path / "dcp", "--output", tmp_path / "alone")
    consolidate(tmp_path / "dcp", "--output", tmp_path / "known", "--base", base)
    expected = stored(tmp_path / "itself")
    for out in ("alone", "known"):
        found = stored(tmp_path / out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_tensors_that_no_model_class_builds_are_copied(base: Path, tmp_path: Path) -> None:
    """The base has a multi-token-prediction head that the adapter does not cover."""
    folder = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    tensors["model.mtp.proj.weight"] = torch.randn(5, 7)
    tensors["model.mtp.steps"] = torch.arange(3)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    model = load("llama", base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    consolidate(folder, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name in ("model.mtp.proj.weight", "model.mtp.steps"):
        assert torch.equal(found[name], tensors[name])


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_base_without_the_prefix_of_the_class_keeps_its_names(kind: str, tmp_path: Path) -> None:
    """As the files of GPT-2 and BLOOM on the hub: `h.0…` is `transformer.h.0…` in memory."""
    model, base = random_model("gpt2"), tmp_path / "base"
    model.save_pretrained(base)
    plain = {n.removeprefix("transformer."): t for n, t in stored(base).items()}
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    check_exportable(base)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, **ADAPTERS["gpt2"]))
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.requires_grad
        model.save_pretrained(tmp_path / "source")
        model = model.merge_and_unload()
    else:
        for parameter in model.parameters():
            parameter.data += 0.5
        dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=tmp_path / "source")
    consolidate(tmp_path / "source", "--base", base, "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == plain.keys()
    assert torch.equal(answer(load("gpt2", tmp_path / "out")), answer(model))


@pytest.mark.parametrize("model_type", SAME_NAMES)
def test_models_listed_as_having_equal_names_have_equal_names(
    model_type: str, tmp_path: Path
) -> None:
    """The code does not query transformers for these models, because its import takes seconds."""
    config = transformers.AutoConfig.for_model(
        model_type, **(SMALL if model_type != "gpt2" else TINY["gpt2"][1])
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    disk = read_header(tmp_path / "model.safetensors")
    naming = find_naming(tmp_path)
    assert naming.to_memory(disk).keys() == disk.keys()
    for dtype in (torch.bfloat16, torch.float16):
        assert not kept_in_fp32(naming.model, disk, dtype)
