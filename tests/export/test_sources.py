"""The command converts each kind of source to a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.export.source import find_source
from launcher.folders.kind import Kind
from tests.helpers.exports import consolidate, make_adapter, plan_of, stored
from tests.helpers.sharded import Trained, save_zero, to_universal

QUESTION = torch.arange(3, 60).view(1, -1)


@pytest.fixture
def trainer_folder(tmp_path: Path, tiny_untied: Path) -> Path:
    """As a trainer saves it: config and tokenizer next to the sharded state."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(tiny_untied, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(QUESTION).logits


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_checkpoint_becomes_a_model_folder(
    ranks: Any, trainer_folder: Path, tiny_untied: Path, tmp_path: Path, stage: int
) -> None:
    kind = Trained(stage, round_robin=True, base=tiny_untied)
    live = ranks.run(3, save_zero, trainer_folder, kind)[0]
    consolidate(trainer_folder, "--output", tmp_path / "out", "--max-shard-size", "30KB")
    found = stored(tmp_path / "out")
    assert found.keys() == live.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in live.items())
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    model.load_state_dict(live)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), model(QUESTION).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert not list((tmp_path / "out").glob("zero_to_*")), "the trainer's own files stay there"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("excluded", [False, True], ids=["with-base", "without-base"])
def test_an_adapter_within_a_deepspeed_checkpoint_is_merged(
    ranks: Any, trainer_folder: Path, tiny_untied: Path, tmp_path: Path, stage: int, excluded: bool
) -> None:
    kind = Trained(stage, lora=True, exclude_frozen=excluded, base=tiny_untied)
    ranks.run(3, save_zero, trainer_folder, kind)
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
    }
    config["base_model_name_or_path"] = str(tiny_untied)
    (trainer_folder / "adapter_config.json").write_text(json.dumps(config))
    consolidate(trainer_folder, "--output", tmp_path / "out")
    consolidate(trainer_folder, "--output", tmp_path / "adapter", "--adapter-only")
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    found = stored(tmp_path / "out")
    changed = 0
    for name, tensor in merged.state_dict().items():
        assert torch.equal(found[name], tensor), name
        changed += not torch.equal(found[name], stored(tiny_untied)[name])
    assert changed > 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_tied_model_stays_one_tensor(ranks: Any, tiny: Path, tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    live = ranks.run(2, save_zero, folder, Trained(stage, base=tiny))[0]
    consolidate(folder, "--output", tmp_path / "out")
    consolidate(folder, "--output", tmp_path / "known", "--base", tiny)
    assert stored(tmp_path / "out").keys() == stored(tiny).keys()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "known" / "model.safetensors"
    ).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto")
    model.load_state_dict(live, strict=False)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), model(QUESTION).logits)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_becomes_the_same_folder(
    ranks: Any, trainer_folder: Path, tiny_untied: Path, tmp_path: Path, stage: int
) -> None:
    ranks.run(3, save_zero, trainer_folder / "zero", Trained(stage, base=tiny_untied))
    to_universal(trainer_folder)
    consolidate(trainer_folder / "zero", "--output", tmp_path / "zero")
    consolidate(trainer_folder / "universal", "--output", tmp_path / "universal")
    ours = stored(tmp_path / "universal")
    assert ours.keys() == stored(tmp_path / "zero").keys()
    assert all(torch.equal(ours[n], tensor) for n, tensor in stored(tmp_path / "zero").items())


def test_an_adapter_without_its_config_is_refused(
    ranks: Any, trainer_folder: Path, tiny_untied: Path
) -> None:
    ranks.run(2, save_zero, trainer_folder, Trained(2, lora=True, base=tiny_untied))
    with pytest.raises(UserError, match=r"no adapter_config\.json beside it"):
        plan_of(trainer_folder)


def save_fsdp(rank_info: RankInfo, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.125
    whole = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    fully_shard(model)
    dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=folder)
    return whole


def test_a_dcp_folder_gets_its_dtype_from_config_or_base(
    ranks: Any, trainer_folder: Path, tiny_untied: Path, tmp_path: Path
) -> None:
    whole = ranks.run(3, save_fsdp, tiny_untied, trainer_folder / "pytorch_model_fsdp_0")[0]
    source = trainer_folder / "pytorch_model_fsdp_0"
    consolidate(source, "--output", tmp_path / "config")
    consolidate(source, "--output", tmp_path / "base", "--base", tiny_untied)
    consolidate(source, "--output", tmp_path / "fp32", "--dtype", "fp32")
    for name, tensor in whole.items():
        assert torch.equal(stored(tmp_path / "config")[name], tensor.bfloat16())
        assert torch.equal(stored(tmp_path / "base")[name], tensor.bfloat16())
        assert torch.equal(stored(tmp_path / "fp32")[name], tensor)
    assert logits(tmp_path / "fp32").dtype == torch.float32


def test_a_sharded_folder_without_config_asks_for_the_base(
    ranks: Any, tiny_untied: Path, tmp_path: Path
) -> None:
    ranks.run(2, save_fsdp, tiny_untied, tmp_path / "a" / "b" / "dcp")
    with pytest.raises(UserError, match=r"no config\.json beside it; name its model with --base"):
        find_source(tmp_path / "a" / "b" / "dcp")


def test_a_model_in_torch_files_is_resharded(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(stored(tiny), tmp_path / "bin" / "pytorch_model.bin")
    consolidate(tmp_path / "bin", "--output", tmp_path / "out")
    consolidate(tiny, "--output", tmp_path / "direct")
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "direct" / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_complete_weights_next_to_sharded_state_are_used(
    ranks: Any, trainer_folder: Path, tiny_untied: Path
) -> None:
    ranks.run(2, save_zero, trainer_folder, Trained(2, base=tiny_untied))
    assert find_source(trainer_folder).kind is Kind.ZERO
    shutil.copy(tiny_untied / "model.safetensors", trainer_folder)
    assert find_source(trainer_folder).kind is Kind.MODEL
    tag = (trainer_folder / "latest").read_text()
    assert find_source(trainer_folder, tag=tag).kind is Kind.ZERO


def test_a_qlora_adapter_merges_into_either_base(tmp_path: Path, tiny_untied: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.bfloat16)
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(UserError, match="no quantization is known"):
        consolidate(adapter, "--output", tmp_path / "no", "--qlora-base", "dequantized")
    (adapter / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    consolidate(adapter, "--output", tmp_path / "original")
    consolidate(adapter, "--output", tmp_path / "seen", "--qlora-base", "dequantized")
    name = "model.layers.0.self_attn.k_proj.weight"  # no adapter on it
    weight = stored(base)[name]
    assert torch.equal(stored(tmp_path / "original")[name], weight)
    if weight.shape[1] % 64 == 0:
        seen = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
        assert torch.equal(stored(tmp_path / "seen")[name], seen)
    assert not torch.equal(stored(tmp_path / "seen")[name], weight)
    assert "quantization_config" not in json.loads((tmp_path / "seen/config.json").read_text())
