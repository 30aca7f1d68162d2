"""Bases of unusual kinds: dtypes that are only copied, torch files on the hub, infinity in
config.json, tied twins, an embedding with more rows than the vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file

from launcher.export.verify import verify
from launcher.folders.model import model_folder
from tests.helpers.exports import consolidate, stored
from tests.helpers.tiny_models import release

TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SMALL = {"d_model": 32, "vocab_size": 60}
LAYERS = {f"{part}_{key}": 1 for part in ("encoder", "decoder") for key in ("layers",)}
HEADS = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1,
    "attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 48,
    "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {**SMALL, "d_kv": 8, "d_ff": 24, "num_layers": 1}),
    "bart": ("BartForConditionalGeneration", SMALL | LAYERS | HEADS),
    "whisper": ("WhisperForConditionalGeneration", SMALL | LAYERS | HEADS | {"pad_token_id": 1}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1}),
    "modernbert": ("ModernBertForMaskedLM", TEXT | {"pad_token_id": 1}),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": TEXT | {"cross_attention_layers": [1], "pad_token_id": 1},
            "vision_config": VISION,
        },
    ),
}


def made(model_type: str, name: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**settings)
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("kind", TIED)
def test_what_a_class_ties_is_stored_once(kind: str, tmp_path: Path) -> None:
    """From DCP of `model.state_dict()`, which has all twins. The embedding of Llama-3.2-Vision has
    eight rows more than its vocabulary."""
    model, folder = made(kind, *TIED[kind]), tmp_path / "base"
    model.save_pretrained(folder)
    expected = stored(folder)
    twins = model.state_dict().keys() - {name for name, _ in model.named_parameters()}
    assert twins & model.all_tied_weights_keys.keys() or kind == "mllama"
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    shutil.copy(folder / "config.json", tmp_path / "dcp")
    for number, where in enumerate([(), ("--base", folder)]):
        out = tmp_path / f"out{number}"
        consolidate(tmp_path / "dcp", *where, "--output", out)
        found = stored(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert (out / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("text_only", [False, True])
def test_infinity_in_a_config_is_read_as_transformers_writes_it(
    text_only: bool, tmp_path: Path
) -> None:
    text = TEXT | MAMBA | {"model_type": "bamba", "attn_layer_indices": [1]}
    settings = {"text_config": text, "vision_config": CLIP}
    made("llava", "LlavaForConditionalGeneration", settings).save_pretrained(tmp_path / "base")
    assert '"__float__": "Infinity"' in (tmp_path / "base/config.json").read_text()
    words = ["--text-only"] if text_only else []
    consolidate(tmp_path / "base", *words, "--output", tmp_path / "out")
    assert '"__float__": "Infinity"' in (tmp_path / "out/config.json").read_text()
    assert "whole" in verify(tmp_path / "out")
    name = "BambaForCausalLM" if text_only else "LlavaForConditionalGeneration"
    assert getattr(transformers, name).from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["mllama", "mixtral"])
def test_torch_files_with_the_names_in_memory_get_those_on_disk(kind: str, tmp_path: Path) -> None:
    """As zero_to_fp32 and FSDP's FULL_STATE_DICT leave them."""
    settings = TEXT | {"num_local_experts": 3}
    model = made(kind, *TIED.get(kind, ("MixtralForCausalLM", settings)))
    model.save_pretrained(tmp_path / "expected")
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tmp_path / "expected/config.json", folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    consolidate(folder, "--output", tmp_path / "out")
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "expected")
    assert found.keys() == expected.keys() != model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tensors_of_every_dtype_of_the_format_are_copied(tiny_untied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_untied, tmp_path / "model"))
    raw = torch.arange(240, dtype=torch.uint8).view(6, 40)
    others = {
        "model.other.scales": raw.view(torch.float8_e8m0fnu),
        "model.other.blocks": raw.clone().view(torch.float4_e2m1fn_x2),
        "model.other.a": torch.randn(3, 4).to(torch.float8_e4m3fnuz),
        "model.other.b": torch.randn(3, 4).to(torch.float8_e5m2fnuz),
        "model.other.c": torch.randn(3, 4, dtype=torch.complex64),
    }
    save_file(stored(folder) | others, folder / "model.safetensors", {"format": "pt"})
    consolidate(folder, "--output", tmp_path / "out", "--max-shard-size", "20KB")
    consolidate(folder, "--output", tmp_path / "cast", "--dtype", "fp16")
    found, cast = stored(tmp_path / "out"), stored(tmp_path / "cast")
    for name, tensor in stored(folder).items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for name in ("model.other.scales", "model.other.blocks", "model.other.c"):
        assert torch.equal(cast[name].view(torch.uint8), others[name].view(torch.uint8)), name
    assert "whole" in verify(tmp_path / "out")


def test_torch_files_of_the_hub_are_fetched_if_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append(list(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("owner/name", None) == tmp_path
    assert len(asked) == 2
    assert {*asked[1]} > {*asked[0]}
    assert "pytorch_model*.bin" in asked[1]
    model_folder("owner/name", None, patterns=("tokenizer*",))
    (tmp_path / "model.safetensors").touch()
    model_folder("owner/name", None)
    assert len(asked) == 4
    assert "pytorch_model*.bin" not in asked[3]


def test_a_prefix_of_all_names_of_a_class_is_not_a_wrapper(tmp_path: Path) -> None:
    release("inkling2_text", tmp_path / "base")
    before = stored(tmp_path / "base")
    assert all(name.startswith("model.llm.") for name in before)
    consolidate(tmp_path / "base", "--output", tmp_path / "out")
    assert stored(tmp_path / "out").keys() == before.keys()
