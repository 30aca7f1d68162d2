"""Composites that AutoModelForCausalLM does not have are trained as their text model, or else as
they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.gemma3n.modeling_gemma3n import (
    Gemma3nForConditionalGeneration,
    Gemma3nTextModel,
)
from transformers.utils import is_timm_available

from launcher.config.schema.model import ModelConfig
from launcher.export.exportable import check_exportable
from launcher.io.absent_towers import absent_towers
from launcher.io.model_class import meta_model, places_of
from launcher.model import load
from launcher.model.layers import decoder_layers
from launcher.model.load import build_model
from tests.helpers.composites import load_composite, make_composite
from tests.helpers.exports import consolidate
from tests.helpers.tiny_models import release, tiny_config

TRAINED = {"llava": "Qwen2ForCausalLM", "mistral3": "MistralForCausalLM"}


def build(folder: Path) -> Any:
    """The model as it is trained, with its values."""
    model, weights = build_model(ModelConfig(name_or_path=str(folder)), folder, 0, torch.float32)
    if weights is not None:
        for slot in weights.slots:
            shape = tuple(slot.source.shape)
            value = slot.source.read((0,) * len(shape), shape)
            setattr(slot.module, slot.attribute, torch.nn.Parameter(value))
        model.tie_weights()  # type: ignore[operator]
    return model.eval()


def test_decoder_layers_are_those_of_the_text_model(tmp_path: Path) -> None:
    folder = make_composite("gemma3", tmp_path)
    model, _ = build_model(ModelConfig(name_or_path=str(folder)), folder, 0, torch.float32)
    text = set(model.get_submodule("model.language_model").modules())
    layers = decoder_layers(model)
    assert layers
    assert text.issuperset(layers)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 30).view(1, -1)).logits
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_the_text_model_is_read_from_the_files_of_the_composite(name: str, tmp_path: Path) -> None:
    folder = make_composite(name, tmp_path)
    model = build(folder)
    assert type(model).__name__ == TRAINED[name]
    assert places_of(model) is not None
    assert torch.allclose(logits(model), logits(load_composite(name, folder)), atol=1e-6)
    check_exportable(folder)


def test_a_head_in_the_files_counts_more_than_the_default_tie_of_a_composite(
    tmp_path: Path,
) -> None:
    """As Mistral-Small is released: config.json does not say that the head is not the embedding."""
    folder = make_composite("mistral3", tmp_path)
    file = folder / "model.safetensors"
    head = torch.randn(259, 32)
    save_file(load_file(file) | {"language_model.lm_head.weight": head}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for each in (config, config["text_config"]):
        each.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    model = build(folder)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)
    check_exportable(folder)


def test_a_whole_composite_is_read_where_slices_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_composite("llava", tmp_path)
    monkeypatch.setattr(load, "_optional_parameter", lambda model, tensors: "a parameter")
    model = build(folder)
    assert torch.allclose(logits(model), logits(load_composite("llava", folder)), atol=1e-6)


def test_a_tower_that_needs_a_missing_package_is_left_out_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 3n without timm: the text is computed, and each tensor of the tower is exported."""
    release("gemma3n", tmp_path)
    model = build(tmp_path)
    said = capsys.readouterr().out
    if not is_timm_available():
        assert "model.vision_tower is left out (TimmWrapperModel requires the timm library" in said
        assert absent_towers(model).keys() == {"model.vision_tower"}
    assert torch.isfinite(logits(model)).all()
    check_exportable(tmp_path)


def test_a_text_model_that_needs_a_missing_package_is_not_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_package(*_: Any, **__: Any) -> None:
        raise ImportError("the text model needs a package")

    monkeypatch.setattr(Gemma3nTextModel, "_from_config", without_package)
    config, original = tiny_config("gemma3n"), vars(transformers.AutoModel)["from_config"]
    with pytest.raises(ImportError, match="the text model needs a package"):
        meta_model(Gemma3nForConditionalGeneration, config)
    assert vars(transformers.AutoModel)["from_config"] is original


@pytest.mark.parametrize(
    ("model_type", "trained"),
    [
        ("aya_vision", "AyaVisionForConditionalGeneration"),  # it does not scale the logits
        ("glmga", "Glm46VForConditionalGeneration"),  # a class of another type's config
        ("cohere_compass", "CohereCompassForCausalLM"),
    ],
)
def test_the_class_that_is_trained_computes_the_logits_of_the_composite(
    model_type: str, trained: str, tmp_path: Path
) -> None:
    composite = getattr(transformers, release(model_type, tmp_path))
    model = build(tmp_path)
    assert type(model).__name__ == trained
    whole = composite.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(logits(model), logits(whole), atol=1e-5)
    check_exportable(tmp_path)


def test_a_text_model_of_other_logits_is_written_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release("aya_vision", tmp_path / "base")
    consolidate(tmp_path / "base", "--text-only", "--output", tmp_path / "text")
    assert "scales or caps its logits: the likeliest token is the same" in capsys.readouterr().out
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    found, expected = logits(text), logits(build(tmp_path / "base"))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert not torch.allclose(found, expected, atol=1e-5)
