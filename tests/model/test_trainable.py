"""Models that are not causal language models are refused before training, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, T5Config, WhisperConfig

from launcher.config.schema.model import ModelConfig
from launcher.errors import UserError
from launcher.model.attention import describe_attention
from launcher.model.load import build_model
from launcher.training.model_checks import check_causality, check_document_masking
from tests.helpers.tiny_models import release, tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "t5 is an encoder-decoder: .* → a decoder-only model"),
        (WhisperConfig(), "whisper is an encoder-decoder"),
        (BertConfig(), "bert with is_decoder=false .* → is_decoder=true in .*config.json"),
    ],
    ids=["t5", "whisper", "bert"],
)
def test_the_config_is_enough_to_refuse(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(name_or_path=str(tmp_path)), tmp_path, 0, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("cpmant", "CpmAntForCausalLM is not causal: its logits depend on the tokens that"),
        (
            "reformer",
            r"^ReformerModelWithLMHead takes no row of 16 tokens in training, only of some lengths "
            r"\(ValueError: .*\) → another causal language model$",
        ),
    ],
)
def test_a_model_of_both_sides_or_of_one_length_is_refused(model_type: str, message: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    with pytest.raises(UserError, match=message):
        check_causality(model, CPU, 259, torch.float32)


def test_a_class_that_packed_documents_stop_is_named() -> None:
    class Zaya(torch.nn.Module):
        """As the real one with the attention of a run."""

        def forward(self, **_: Any) -> None:
            raise RuntimeError("The size of tensor a (8) must match that of b (16). Look elsewhere")

    model = Zaya()
    sentence = (
        r"^data.packing=true: Zaya does not compute a sequence of several documents "
        r"\(RuntimeError: The size of tensor a \(8\) must match that of b \(16\)\) "
        r"→ data.packing=false$"
    )
    with pytest.raises(UserError, match=sentence):
        check_document_masking(model, CPU, 259, torch.float32)


def test_a_missing_package_is_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_timm(*_: Any, **__: Any) -> None:
        raise ImportError("\nTower requires the timm library but it was not found. You can:\n`pip")

    tiny_config("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", without_timm)
    with pytest.raises(UserError, match=r"the timm library but it was not found → install it for"):
        build_model(ModelConfig(name_or_path=str(tmp_path)), tmp_path, 0, torch.float32)


@pytest.mark.parametrize("model_type", ["gpt_oss", "bloom", "mamba2", "bert"])
def test_a_causal_model_passes(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    check_causality(model, CPU, 259, torch.float32)
    assert model.training


@pytest.mark.parametrize(
    ("model_type", "attention", "said"),
    [
        ("gpt_oss", "eager", "eager, because GptOssForCausalLM has no sdpa"),
        ("mamba2", "eager", "eager, because Mamba2ForCausalLM has no sdpa"),
        ("olmo2", "sdpa", "sdpa"),
        ("llama", "shardway_causal", "sdpa, causal, without a mask tensor"),
    ],
)
def test_attention_is_what_the_class_has(
    model_type: str, attention: str, said: str, tmp_path: Path
) -> None:
    release(model_type, tmp_path)
    model, _ = build_model(ModelConfig(name_or_path=str(tmp_path)), tmp_path, 0, torch.float32)
    used: Any = model.config
    assert used._attn_implementation == attention
    assert describe_attention("sdpa", model) == said
