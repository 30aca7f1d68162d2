"""Names in memory and on disk equal those of models that transformers made and saved."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.names import Naming, find_naming
from launcher.io.readers.safetensors_file import read_header
from launcher.io.tensor import Tensor, in_memory
from launcher.io.tensor.stored import Stored
from tests.helpers.architectures import MODELS

OWN = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.a = torch.nn.Linear(3, 3, bias=False)
        self.post_init()
"""


@dataclass(frozen=True)
class Saved:
    folder: Path
    live: dict[str, torch.Tensor]
    naming: Naming

    @property
    def disk(self) -> dict[str, Tensor]:
        return read_header(self.folder / "model.safetensors")

    @property
    def memory(self) -> dict[str, Tensor]:
        return {name: in_memory(name, value, self.folder) for name, value in self.live.items()}


def save(kind: str, folder: Path) -> Saved:
    architecture, settings = MODELS[kind]
    transformers.set_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**settings)).bfloat16()
    model.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    live = {name: value for name, value in model.state_dict().items() if name not in tied}
    return Saved(folder, live, find_naming(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(kind: str) -> Saved:
        if kind not in made:
            made[kind] = save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, saved: Callable[[str], Saved]) -> Saved:
    return saved(request.param)


def assert_same(found: dict[str, Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Keys, shapes, and bits are equal; also by the slow implementation, in tiles of odd height."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.name, tensor.dtype) == (name, expected[name].dtype)
        torch.testing.assert_close(tensor.read_all(), expected[name], rtol=0, atol=0)
        matrix = expected[name].reshape(tensor.rows, tensor.columns)
        first = random.Random(name).randrange(tensor.rows)
        last = min(tensor.rows, first + 7)
        torch.testing.assert_close(tensor.read(first, last), matrix[first:last], rtol=0, atol=0)
        assert torch.equal(tensor.reference(first, last), matrix[first:last].double())


def test_tensors_on_disk_become_the_live_state_dict(model: Saved) -> None:
    assert_same(model.naming.to_memory(model.disk), model.live)


def test_the_live_state_dict_becomes_the_tensors_on_disk(model: Saved) -> None:
    assert_same(model.naming.to_disk(model.memory), load_file(model.folder / "model.safetensors"))


def test_an_unchanged_tensor_is_written_unchanged(model: Saved) -> None:
    assert model.naming.to_disk(model.naming.to_memory(model.disk)) == model.disk


def test_a_change_in_memory_reaches_the_disk(saved: Callable[[str], Saved]) -> None:
    mixtral = saved("mixtral")
    memory = mixtral.naming.to_memory(mixtral.disk)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    memory[name] = in_memory(name, mixtral.live[name] * 2, mixtral.folder)
    disk = mixtral.naming.to_disk(memory)
    stored = load_file(mixtral.folder / "model.safetensors")
    changed = {name for name, tensor in disk.items() if not isinstance(tensor, Stored)}
    layer = "model.layers.1.block_sparse_moe.experts"
    assert changed == {f"{layer}.{e}.{w}.weight" for e in range(3) for w in ("w1", "w3")}
    assert all(torch.equal(disk[name].read_all(), stored[name] * 2) for name in changed)


def test_a_tensor_that_no_class_builds_keeps_its_name(saved: Callable[[str], Saved]) -> None:
    deepseek = saved("deepseek_v3")
    extra = {
        name: in_memory(name, torch.ones(8, 32), deepseek.folder)
        for name in ("model.layers.2.mlp.experts.0.gate_proj.weight", "model.mtp.eh_proj.weight")
    }
    memory = deepseek.naming.to_memory(deepseek.disk | extra)
    assert all(memory[name] == tensor for name, tensor in extra.items())
    assert deepseek.naming.to_disk(memory) == deepseek.disk | extra


def test_an_older_layout_is_written_as_in_the_base(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    vision = saved("qwen2_5_vl")
    older = {  # as the hub's folders of 2025: no `model.visual`, no `language_model`
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in load_file(vision.folder / "model.safetensors").items()
    }
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    vision.naming.model.config.save_pretrained(tmp_path)
    again = tmp_path / "again"
    model_class.from_pretrained(tmp_path).save_pretrained(again)
    disk = read_header(tmp_path / "model.safetensors")
    naming = find_naming(tmp_path, names=disk)
    found = naming.to_disk(naming.to_memory(disk))
    assert_same(found, load_file(again / "model.safetensors"))
    assert found.keys() == older.keys()


@pytest.mark.parametrize(
    ("part", "fused"),
    [("down_proj", r"down_proj: .* 10 more make up"), ("up_proj", "gate_up_proj from")],
)
def test_a_missing_expert_is_named(part: str, fused: str, saved: Callable[[str], Saved]) -> None:
    disk = saved("qwen3_moe").disk
    del disk[f"model.layers.1.mlp.experts.7.{part}.weight"]
    with pytest.raises(UserError, match=rf"layers\.1\.mlp\.experts\.{fused}"):
        saved("qwen3_moe").naming.to_memory(disk)


def test_a_missing_tensor_is_named(saved: Callable[[str], Saved]) -> None:
    memory = saved("qwen3_moe").memory
    del memory["model.norm.weight"]
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight of Qwen3MoeForCausalLM"):
        saved("qwen3_moe").naming.to_disk(memory)


def test_one_of_two_tied_names_is_enough(saved: Callable[[str], Saved]) -> None:
    llama = saved("llama")
    memory = llama.memory
    embedding = memory.pop("model.embed_tokens.weight")
    with pytest.raises(UserError, match=r"lacks model\.embed_tokens\.weight"):
        llama.naming.to_disk(memory)
    memory["lm_head.weight"] = embedding.renamed("lm_head.weight")
    assert "lm_head.weight" in llama.naming.to_disk(memory)


def test_a_model_of_the_folders_own_code_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    (tmp_path / "own.py").write_text(OWN)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model_type is own"):
        find_naming(tmp_path)
    naming = find_naming(tmp_path, trust_remote_code=True)
    tensors = {"a.weight": in_memory("a.weight", torch.ones(3, 3), tmp_path)}
    assert naming.shapes == {"a.weight": (3, 3)}
    assert naming.to_disk(naming.to_memory(tensors)) == tensors


def test_more_tokens_are_accepted_and_other_shapes_are_refused(
    saved: Callable[[str], Saved],
) -> None:
    qwen = saved("qwen3_moe")
    resized = {
        name: in_memory(name, torch.ones(48, 32), qwen.folder)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    disk = qwen.naming.to_disk(qwen.memory | resized)
    assert {disk[name].shape for name in resized} == {(48, 32)}
    norm = in_memory("model.norm.weight", torch.ones(48), qwen.folder)
    with pytest.raises(UserError, match=r"model\.norm\.weight has the shape \[48\]"):
        qwen.naming.to_disk(qwen.memory | {norm.name: norm})


def test_an_unknown_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Own"]}))
    with pytest.raises(UserError, match="architectures names Own"):
        find_naming(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(UserError, match="own"):
        find_naming(tmp_path)


def test_a_config_that_asks_for_flash_attention_is_read(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    config = json.loads((saved("llama").folder / "config.json").read_text())
    config["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_naming(tmp_path).shapes == saved("llama").naming.shapes


def test_an_operation_that_cannot_be_traced_is_named(saved: Callable[[str], Saved]) -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Doubled(ConversionOps):
        def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
            return {name: values[0] * 2 for name, values in input_dict.items()}

    llama = saved("llama")
    converter = WeightConverter("model.norm.weight", "model.norm.weight", [Doubled()])
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(Doubled\): torch's mul"):
        replace(llama.naming, conversions=(converter,)).to_memory(llama.disk)
