"""Folders whose files disagree with each other or with the model are refused in one sentence,
before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.config.schema.model import ModelConfig
from launcher.errors import UserError
from launcher.io.readers import model_folder
from launcher.model.folder import SafetensorsFolder
from launcher.model.load import build_model
from tests.helpers.stored_models import Tensors, edit, publish

INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"
EXPERT = "model.layers.0.mlp.experts.1"


def load(folder: Path) -> None:
    config = ModelConfig(name_or_path=str(folder), attention="eager")
    build_model(config, folder, 0, torch.float32)


def cut(folder: Path) -> dict[str, str]:
    """Cut a model's only file into two; return the weight map of its index."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    weight_map = {}
    for index in (0, 1):
        name = f"model-{index + 1:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::2]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def beside(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    cut(folder)
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def twice(folder: Path) -> None:
    weight_map = cut(folder)
    (other,) = {*weight_map.values()} - {weight_map[NORM]}
    tensors = load_file(folder / other)
    save_file(tensors | {NORM: torch.zeros(32)}, folder / other, {"format": "pt"})


def unlisted(folder: Path) -> None:
    weight_map = cut(folder)
    del weight_map[NORM]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (beside, r"contains model\.safetensors and model\.safetensors\.index\.json.*other files"),
        (twice, r"model\.norm\.weight is in both model-0000"),
        (unlisted, r"contains model\.norm\.weight .*does not list"),
    ],
)
def test_training_and_export_refuse_an_index_that_libraries_read_differently(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    change(publish("qwen3_moe", tmp_path))
    for read in (SafetensorsFolder, model_folder.read_model):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_an_index_of_the_only_file_is_read(tmp_path: Path) -> None:
    folder = publish("qwen3_moe", tmp_path)
    names = load_file(folder / "model.safetensors").keys()
    weight_map = dict.fromkeys(names, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert SafetensorsFolder(folder).keys() == names
    load(folder)


def lose_up(tensors: Tensors) -> None:
    del tensors[f"{EXPERT}.up_proj.weight"]


def shorten_down(tensors: Tensors) -> None:
    name = f"{EXPERT}.down_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def transpose_gate(tensors: Tensors) -> None:
    name = f"{EXPERT}.gate_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def add_stack(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(5, 32, 16)


def move(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[f"model.language_{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_up, r"gate_up_proj cannot be made of tensors of the shapes .* all tensors$"),
        (shorten_down, r"experts\.down_proj cannot be made of .*\[32, 16\] and \[31, 16\] in"),
        (transpose_gate, r"experts\.gate_up_proj cannot be made of .*\[16, 32\] and \[32, 16\] in"),
        (add_stack, r"cannot read the files as Qwen3MoeForCausalLM .*in two layouts"),
        (move, r"no model\.embed_tokens.* but model\.language_model\.embed_tokens\.weight →"),
    ],
)
def test_tensors_of_which_a_model_cannot_be_made_are_named(
    change: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    folder = edit(publish("qwen3_moe", tmp_path), change)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_what_transformers_cannot_load_whole_is_one_sentence(tmp_path: Path) -> None:
    folder = publish("qwen3_moe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^model\.name_or_path={folder} cannot be read: "):
        load(folder)
