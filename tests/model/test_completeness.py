"""A model folder whose tensors do not fit its config.json is refused by the tensor's name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.config.schema.model import ModelConfig
from launcher.errors import UserError
from launcher.folders.vocabulary import find_missing_head, find_separate_head
from launcher.io.weight_views import read_full
from launcher.model.load import build_model
from launcher.model.tiny import make_tiny

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def make(folder: Path, tie: bool, edit: Callable[[Tensors], Any], unused: bool = False) -> Path:
    """A tiny model with edited tensors; `unused`: with one that transformers ignores, so that the
    complete model is read."""
    make_tiny(folder, tie=tie)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    if unused:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> Any:
    return build_model(ModelConfig(name_or_path=str(folder)), folder, 0, torch.float32)


def add_head(change: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + change})


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize(
    ("tie", "name"), [(False, HEAD), (True, NORM), (True, EMBEDDING), (False, EMBEDDING)]
)
def test_a_missing_parameter_is_refused(folder: Path, tie: bool, name: str, unused: bool) -> None:
    make(folder, tie, lambda tensors: tensors.pop(name), unused)
    with pytest.raises(UserError, match=rf"contain no {re.escape(name)}, which would be random"):
        load(folder)


def test_a_missing_head_is_refused_without_the_flag(folder: Path) -> None:
    make(folder, False, lambda tensors: tensors.pop(HEAD))
    assert find_missing_head(folder) == HEAD
    edit_config(folder, lambda config: config.pop("tie_word_embeddings"))
    assert find_missing_head(folder) is None, "only transformers knows the default"
    with pytest.raises(UserError, match=r"contain no lm_head\.weight.*tie_word_embeddings=true"):
        load(folder)


@pytest.mark.parametrize("unused", [False, True])
def test_a_tied_head_with_values_of_its_own_is_refused(folder: Path, unused: bool) -> None:
    make(folder, True, add_head(1.0), unused)
    assert find_separate_head(folder) == (HEAD, EMBEDDING)
    with pytest.raises(UserError, match=rf"{HEAD} differs from {EMBEDDING}.*=false in"):
        load(folder)
    edit_config(folder, lambda config: config.update(tie_word_embeddings=False))
    assert find_separate_head(folder) is None
    model, _ = load(folder)
    assert HEAD in dict(model.named_parameters())


@pytest.mark.parametrize("unused", [False, True])
def test_a_tied_head_that_repeats_the_embedding_is_accepted(folder: Path, unused: bool) -> None:
    make(folder, True, add_head(0.0), unused)
    assert find_separate_head(folder) is None
    assert load(folder)[0] is not None


def test_a_difference_in_the_last_row_is_found(folder: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1

    make(folder, True, edit)
    assert find_separate_head(folder) == (HEAD, EMBEDDING)
    with pytest.raises(UserError, match=HEAD):
        load(folder)


def test_a_model_whose_files_have_only_the_head_is_read_from_it(folder: Path) -> None:
    make(folder, True, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, weights = load(folder)
    slot = weights.by_parameter()[id(model.get_input_embeddings().weight)]
    assert torch.equal(read_full(slot.source), expected.lm_head.weight.detach())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_another_shape_is_refused_by_name(folder: Path) -> None:
    make(folder, True, lambda tensors: tensors.update({NORM: torch.ones(7)}))
    with pytest.raises(UserError, match=r"model.norm.weight has the shape \[7\].*describes \[48\]"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "separate"),
    [
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({}, False),
    ],
)
def test_the_flag_of_a_nested_config_is_read(
    folder: Path, config: dict[str, Any], separate: bool
) -> None:
    make(folder, True, add_head(1.0))
    (folder / "config.json").write_text(json.dumps(config))
    assert (find_separate_head(folder) is not None) is separate


def test_a_head_of_another_name_is_no_missing_head(folder: Path) -> None:
    make(folder, False, lambda tensors: tensors.update({"unknown.weight": tensors.pop(HEAD)}))
    assert find_missing_head(folder) is None
