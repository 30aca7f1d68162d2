"""Tied embedding and head: the merged model gives the outputs of the model with its adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.merge import Merged
from launcher.export.merge.ties import config_changes, is_tied
from tests.helpers.merging import merged, model, trained

TOKENS = torch.tensor([[3, 7, 1, 100, 50]])
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more time than they save on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of_adapter(folder: Path, kind: str = "tied", rows: int = 101) -> torch.Tensor:
    from peft import PeftModel

    live = model(kind)
    if rows != 101:
        live.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        return PeftModel.from_pretrained(live, folder).eval()(TOKENS).logits


def logits_of(result: Merged, kind: str = "tied") -> torch.Tensor:
    config = copy.deepcopy(model(kind).config)
    for key, value in result.config.items():
        setattr(config, key, value)
    live = type(model(kind))(config)
    state = {name: tensor.read_all() for name, tensor in result.tensors.items()}
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    live.load_state_dict(state)
    with torch.no_grad():
        return live.eval()(TOKENS).logits


SIDES: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "DoRA on the head": {"target_modules": ["lm_head"], "use_dora": True},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a trained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "other LoRA on each": {"target_modules": ["embed_tokens", "lm_head"]},
    "LoRA tied by PEFT at another scale": {
        "target_modules": ["embed_tokens"],
        "ensure_weight_tying": True,
        "alpha_pattern": {"lm_head": 20},
    },
    "tokens of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [5, 2]},
    },
    "other tokens on each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [5, 2]},
    },
}


@pytest.mark.parametrize("settings", SIDES.values(), ids=SIDES.keys())
def test_embedding_and_head_that_differ_become_two_tensors(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = trained(tmp_path / "adapter", "tied", **settings)
    result = merged(model("tied"), folder)
    assert result.config["tie_word_embeddings"] is False
    assert {EMBEDDING, HEAD} <= result.tensors.keys()
    assert any("no longer tied" in note for note in result.notes)
    torch.testing.assert_close(logits_of(result), logits_of_adapter(folder), atol=2e-5, rtol=1e-4)


TOGETHER: dict[str, dict[str, Any]] = {
    "tokens of the embedding": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [7, 100, 3],
    },
    "the same tokens on both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]},
    },
    "LoRA tied by PEFT": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "an embedding tied by PEFT": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("settings", TOGETHER.values(), ids=TOGETHER.keys())
def test_embedding_and_head_that_stay_equal_stay_one_tensor(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = trained(tmp_path / "adapter", "tied", **settings)
    result = merged(model("tied"), folder, tied="error")
    assert result.config == {}
    assert HEAD not in result.tensors
    torch.testing.assert_close(logits_of(result), logits_of_adapter(folder), atol=2e-5, rtol=1e-4)


def test_an_embedding_that_peft_ties_replaces_the_missing_head(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "tied", **TOGETHER["an embedding tied by PEFT"])
    expected, file = logits_of_adapter(folder), folder / "adapter_model.safetensors"
    lacking = {name: each for name, each in load_file(file).items() if "lm_head" not in name}
    save_file(lacking, file, {"format": "pt"})
    result = merged(model("tied"), folder, tied="error")
    torch.testing.assert_close(logits_of(result), expected, atol=2e-5, rtol=1e-4)


def test_a_tie_that_would_break_is_refused_if_requested(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "tied", target_modules=["lm_head"])
    with pytest.raises(UserError, match="--tied untie"):
        merged(model("tied"), folder, tied="error")


def test_untie_writes_both_even_when_they_are_the_same(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "tied", target_modules=["q_proj"])
    result = merged(model("tied"), folder, tied="untie")
    assert torch.equal(result.tensors[HEAD].read_all(), result.tensors[EMBEDDING].read_all())
    assert result.config == {"tie_word_embeddings": False}


def grown(rows: int) -> Callable[[Any], Any]:
    def prepare(live: Any) -> Any:
        live.resize_token_embeddings(rows, mean_resizing=False)
        return live

    return prepare


@pytest.mark.parametrize("rows", [109, 96])
@pytest.mark.parametrize("kind", ["tied", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [90, 95]},
    ],
    ids=["saved", "LoRA", "modules_to_save", "tokens"],
)
def test_a_resized_vocabulary_is_written_to_the_config(
    settings: dict[str, Any], kind: str, rows: int, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    live = grown(rows)(model(kind))
    torch.manual_seed(2)
    peft_model = get_peft_model(live, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path / "adapter"
    peft_model.save_pretrained(folder, save_embedding_layers=True)
    result = merged(model(kind), folder)
    assert result.config["vocab_size"] == rows
    assert result.tensors[EMBEDDING].shape == (rows, 32)
    tokens = TOKENS.clamp(max=rows - 1)
    fresh = PeftModel.from_pretrained(grown(rows)(model(kind)), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft_model.eval()(tokens).logits, fresh(tokens).logits)
    if rows > 101:
        expected = logits_of_adapter(folder, kind, rows)
        torch.testing.assert_close(logits_of(result, kind), expected, atol=2e-5, rtol=1e-4)


def test_a_vocabulary_of_two_sizes_is_refused(tmp_path: Path) -> None:
    folder = trained(
        tmp_path / "adapter",
        "llama",
        grown(109),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    )
    with pytest.raises(UserError, match=r"has 109 rows and lm_head\.weight 101"):
        merged(model("llama"), folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_flag_in_text_config_alone_is_read_and_changed(tied: bool) -> None:
    config = {"text_config": {"tie_word_embeddings": tied, "vocab_size": 7}}
    assert [is_tied(config, has_head) for has_head in (True, False)] == [tied, tied]
    assert not is_tied({**config, "tie_word_embeddings": False}, has_head=False)
    changes = config_changes(config, tie_word_embeddings=not tied, vocab_size=9)
    assert changes == {
        "text_config": {"tie_word_embeddings": not tied, "vocab_size": 9},
        "tie_word_embeddings": not tied,
    }


def test_the_text_model_of_a_multimodal_config_is_untied_too(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "llava", target_modules=["embed_tokens", "v_proj"])
    result = merged(model("llava"), folder)
    assert result.config["tie_word_embeddings"] is False
    assert result.config["text_config"]["tie_word_embeddings"] is False
    assert result.config["text_config"]["hidden_size"] == 32, "the rest of it stays"
    assert {"model.language_model.embed_tokens.weight", HEAD} <= result.tensors.keys()
    embedding = result.tensors["model.language_model.embed_tokens.weight"].read_all()
    base = model("llava").state_dict()[HEAD]
    assert torch.equal(result.tensors[HEAD].read_all(), base)
    assert not torch.equal(embedding, base)
