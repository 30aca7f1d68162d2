"""Folders that are released quantized: exported in 16 bits, merged into, and written in their own
format again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from launcher.config.rules.model import DEQUANTIZED
from launcher.config.rules.table import RULES
from launcher.errors import UserError
from launcher.export.quantized.released import METHODS
from launcher.export.verify import verify
from launcher.export.writing import write
from launcher.folders.quantization import KEY
from tests.export.test_released_formats import random
from tests.helpers.exports import consolidate, contents, make_adapter, merged_by_peft, stored
from tests.helpers.stored_models import edit, publish

BF16 = torch.bfloat16
Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
TARGETED = r"layers\.[01].*o_proj"
SKIPPED = ("embed_tokens", "lm_head", "mlp.gate.", "kv_a_proj", "bias", "norm")


def with_config(folder: Path, **changes: Any) -> Path:
    """Change config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def to_fp8(tensors: Tensors) -> None:
    settings = SimpleNamespace(weight_block_size=(16, 16), scale_fmt="float")
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    for name in list(tensors):
        if tensors[name].ndim == 2 and not any(part in name for part in SKIPPED):
            tensors |= quantize._quantize_one(name, tensors.pop(name))


def from_fp8(tensors: Tensors) -> Tensors:
    dequantize = Fp8Dequantize(None)._dequantize_one
    return {
        name: dequantize(tensor, tensors[f"{name}_scale_inv"], BF16)
        if f"{name}_scale_inv" in tensors
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In FP8, with fp32 correction biases and a tensor of a multi-token-prediction layer."""
    folder = publish("deepseek_v3", tmp_path_factory.mktemp("fp8"), BF16)

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("correction_bias"):
                tensors[name] = tensors[name].float()
        tensors["model.layers.2.mlp.up_proj.weight"] = random(32, 32).to(BF16)
        to_fp8(tensors)

    return with_config(edit(folder, change), quantization_config=FP8)


@pytest.fixture(scope="module")
def plain(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16, made by transformers' own arithmetic."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(deepseek, folder)
    tensors = from_fp8(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return with_config(folder, quantization_config=None)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_an_fp8_folder_becomes_its_model_in_16_bits(
    deepseek: Path, plain: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    consolidate(deepseek, "--output", out, "--max-shard-size", "40KB")
    assert "the quantized weights were dequantized" in capsys.readouterr().out
    assert_same(stored(out), stored(plain))
    assert config_of(out) == config_of(plain)
    assert "whole" in verify(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == BF16
    consolidate(deepseek, "--output", tmp_path / "same", "--dtype", "base")
    assert_same(stored(tmp_path / "same"), stored(deepseek))
    assert (tmp_path / "same/config.json").read_bytes() == (deepseek / "config.json").read_bytes()
    assert "quantized" in verify(tmp_path / "same")


def test_the_dry_run_counts_dequantized_bytes(
    deepseek: Path, plain: Path, tmp_path: Path, capsys: Any
) -> None:
    consolidate(deepseek, "--output", tmp_path / "out", "--dry-run", "--json")
    size = sum(tensor.nbytes for tensor in stored(plain).values())
    assert json.loads(capsys.readouterr().out)["bytes"] == size


def test_an_adapter_is_merged_into_an_fp8_base(deepseek: Path, plain: Path, tmp_path: Path) -> None:
    """Equal to PEFT's merge into the dequantized folder, and, in the base's format, to that merge
    quantized by transformers. Experts and other weights without an adapter keep their bytes."""
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules=["o_proj"])
    words = (adapter, "--base", deepseek, "--output")
    consolidate(*words, tmp_path / "out")
    consolidate(adapter, "--base", plain, "--output", tmp_path / "plain")
    found = stored(tmp_path / "out")
    assert_same(found, stored(tmp_path / "plain"))
    for name, parameter in merged_by_peft(plain, adapter).items():
        assert "o_proj" not in name or torch.equal(found[name], parameter), name
    consolidate(*words, tmp_path / "base", "--dtype", "base")
    expected = stored(deepseek)
    changed = {name: found[name] for name in found if re.search(TARGETED, name)}
    assert len(changed) == 2
    to_fp8(changed)
    assert_same(stored(tmp_path / "base"), expected | changed)
    assert config_of(tmp_path / "base") == config_of(deepseek)
    manifest = json.loads((tmp_path / "base/consolidation_manifest.json").read_text())
    actions = {name: entry["action"] for name, entry in manifest["tensors"].items()}
    assert {actions[name] for name in changed} == {"merged (LoRA), quantized"}
    assert {actions[name] for name in expected.keys() - changed.keys()} == {"copied"}


def test_a_trained_model_over_an_fp8_base(deepseek: Path, plain: Path, tmp_path: Path) -> None:
    """A full checkpoint in DCP, whose base is quantized: trained weights in 16 bits or again in
    FP8, with the tensors that the class does not build from the base."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    dcp.save({"model": model.state_dict()}, storage_writer=FileSystemWriter(tmp_path / "dcp"))
    words = (tmp_path / "dcp", "--base", deepseek, "--output")
    consolidate(*words, tmp_path / "out")
    consolidate(tmp_path / "dcp", "--base", plain, "--output", tmp_path / "plain")
    found = stored(tmp_path / "out")
    assert_same(found, stored(tmp_path / "plain"))
    consolidate(*words, tmp_path / "base", "--dtype", "base")
    unbuilt = {n: t for n, t in stored(deepseek).items() if n.startswith("model.layers.2.")}
    expected = {name: tensor for name, tensor in found.items() if name not in unbuilt}
    to_fp8(expected)
    assert_same(stored(tmp_path / "base"), expected | unbuilt)


def test_an_interrupted_export_of_an_fp8_folder_is_resumed(
    deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (deepseek, "--max-shard-size", "20KB", "--workers", "1", "--output")
    consolidate(*words, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_extra_files", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            consolidate(*words, tmp_path / "out")
    first, *others = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
    kept = [file.stat().st_ino for file in others]
    first.unlink()
    consolidate(*words, tmp_path / "out", "--resume")
    assert [(tmp_path / "out" / file.name).stat().st_ino for file in others] == kept != []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def to_mxfp4(tensors: Tensors) -> None:
    """Random numbers and scales in place of the experts."""
    generator = torch.Generator().manual_seed(6)
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            shape = experts, outputs, inputs // 32
            draw = {"dtype": torch.uint8, "generator": generator}
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), **draw)
            tensors[f"{name}_scales"] = torch.randint(115, 122, shape, **draw)


def test_gpt_oss_becomes_a_folder_that_can_be_trained(tmp_path: Path) -> None:
    folder = publish("gpt_oss", tmp_path / "mxfp4", BF16, intermediate_size=64)
    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    with_config(edit(folder, to_mxfp4), quantization_config=scheme, dtype=None)
    consolidate(folder, "--output", tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=BF16, quantization_config=Mxfp4Config(dequantize=True)
    )
    assert_same(stored(tmp_path / "out"), dict(expected.state_dict()))
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert "not compared" not in verify(tmp_path / "out")
    adapter = make_adapter(
        tmp_path / "out",
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    consolidate(adapter, "--base", folder, "--output", tmp_path / "merged")
    merged = stored(tmp_path / "merged")
    for name, parameter in merged_by_peft(tmp_path / "out", adapter).items():
        assert torch.equal(merged[name], parameter), name
    consolidate(adapter, "--base", folder, "--output", tmp_path / "base", "--dtype", "base")
    again, before = stored(tmp_path / "base"), stored(folder)
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    assert again.keys() == before.keys()
    assert not torch.equal(again[name], before[name])
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    assert torch.equal(again[name], before[name])


def test_a_config_that_says_quantized_over_plain_weights(
    plain: Path, tmp_path: Path, capsys: Any
) -> None:
    """A checkpoint in bf16 beside the config.json of the model that was quantized."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=BF16)
    dcp.save({"model": model.state_dict()}, storage_writer=FileSystemWriter(tmp_path / "dcp"))
    shutil.copy(plain / "config.json", tmp_path / "dcp")
    with_config(tmp_path / "dcp", quantization_config={"quant_method": "gptq"})
    consolidate(tmp_path / "dcp", "--output", tmp_path / "out")
    assert "quantization_config was left out" in capsys.readouterr().out
    assert config_of(tmp_path / "out") == config_of(plain)


def test_a_folder_of_modelopt(deepseek: Path, plain: Path, tmp_path: Path) -> None:
    """hf_quant_config.json states the quantization; it is left out of a folder in 16 bits."""
    folder = tmp_path / "modelopt"
    shutil.copytree(deepseek, folder)
    with_config(folder, quantization_config=None)
    settings: dict[str, Any] = {"quantization": {"quant_algo": "FP8_PB_WO"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)

    edit(folder, rename)
    consolidate(folder, "--output", tmp_path / "out")
    assert_same(stored(tmp_path / "out"), stored(plain))
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    consolidate(folder, "--output", tmp_path / "same", "--dtype", "base")
    assert (tmp_path / "same/hf_quant_config.json").is_file()
    assert_same(stored(tmp_path / "same"), stored(folder))
    settings["quantization"]["quant_algo"] = "NVFP4"
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="quant_algo NVFP4 cannot be dequantized"):
        consolidate(folder, "--output", tmp_path / "no")


def test_a_quantized_model_cannot_be_trained_before_it_is_dequantized(
    deepseek: Path, plain: Path, tmp_path: Path
) -> None:
    (rule,) = (rule for rule in RULES if rule.id == "model-is-not-quantized")
    config: Any = SimpleNamespace(model=SimpleNamespace(name_or_path=str(deepseek)))
    world: Any = None
    assert rule.broken(config, world)
    assert f"`shardway consolidate {deepseek} --output FOLDER`" in rule.fix(config, world)
    for name, content in (
        ("hf_quant_config.json", {}),
        ("config.json", {"text_config": {KEY: {}}}),
    ):
        folder = tmp_path / name
        shutil.copytree(plain, folder)
        config.model.name_or_path = str(folder)
        assert not rule.broken(config, world)
        (folder / name).write_text(json.dumps(content))
        assert rule.broken(config, world)
    assert {*DEQUANTIZED} == {"bitsandbytes", *METHODS}


@pytest.mark.parametrize("option", ["--text-only", "--adapter-only"])
def test_a_part_of_a_model_has_no_base_format(option: str, deepseek: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--dtype base .* {option} writes a part"):
        consolidate(deepseek, "--output", tmp_path / "out", "--dtype", "base", option)
