"""New rows are trained under every method, and a tied head stays tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.config.schema.method import METHODS
from launcher.method import build_method
from launcher.method.vocabulary import describe_vocabulary, train_vocabulary


def trained_weights(folder: Path, method: str) -> tuple[bool, bool, bool]:
    """Whether the embedding and the head are trained, and whether they are one parameter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = train_vocabulary(METHODS[method](name=method), model)
    prepared = build_method(config, keep_tie=True).prepare(model, seed=0)
    embedding, head = prepared.get_input_embeddings(), prepared.get_output_embeddings()
    weights = embedding.weight, head.weight
    return weights[0].requires_grad, weights[1].requires_grad, weights[0] is weights[1]


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_are_trained(tiny: Path, tiny_untied: Path, method: str, tied: bool) -> None:
    assert trained_weights(tiny if tied else tiny_untied, method) == (True, True, tied)


def test_modules_that_are_trained_already_are_not_named_twice(tiny_untied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_untied)
    config = METHODS["lora"](name="lora", modules_to_save=["embed_tokens"])
    assert train_vocabulary(config, model).modules_to_save == ["embed_tokens", "lm_head"]
    config = METHODS["freeze"](name="freeze")
    extra = train_vocabulary(config, model).extra_modules
    assert extra == ["model.embed_tokens", "lm_head"]


def test_the_memory_is_that_of_the_distinct_weights(tiny: Path, tiny_untied: Path) -> None:
    for folder, count in ((tiny, 259 * 48), (tiny_untied, 2 * 259 * 48)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        said = describe_vocabulary(model, torch.float32)
        assert f"{count:,} parameters, {count * 4 / 1e6:.1f} MB as float32" in said


def test_a_tied_head_is_written_read_and_trained_further_with_its_embedding(
    tiny: Path, tmp_path: Path
) -> None:
    def prepare(adapter: str | None) -> tuple[object, torch.nn.Module]:
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        config = METHODS["lora"](name="lora", adapter=adapter)
        method = build_method(train_vocabulary(config, model), keep_tie=True)
        return method, method.prepare(model, seed=0)

    method, model = prepare(None)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    method.write(model, trained, tmp_path / "adapter")
    back = method.read(model, tmp_path / "adapter")
    assert back.keys() == trained.keys()
    assert all(torch.equal(back[name], trained[name]) for name in trained)
    _, further = prepare(str(tmp_path / "adapter"))
    embedding, head = further.get_input_embeddings(), further.get_output_embeddings()
    assert embedding.weight is head.weight
    assert torch.equal(embedding.weight, model.get_input_embeddings().weight)
