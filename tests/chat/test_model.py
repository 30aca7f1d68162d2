"""A real model streams its answers, and its errors reach the caller."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.chat.model import ChatModel
from launcher.chat.options import Options
from launcher.chat.target import find_target
from launcher.errors import UserError
from tests.helpers.chat import edit
from tests.helpers.ends import END, EOS, START, make_base, make_checkpoint
from tests.helpers.exports import consolidate, make_adapter

HI = [{"role": "user", "content": "hi"}]
SHORT = Options(max_new_tokens=24)


@pytest.fixture(scope="module")
def talk(tiny: Path) -> ChatModel:
    return ChatModel(find_target(tiny))


def logits(talk: ChatModel) -> torch.Tensor:
    with torch.no_grad():
        return talk.model(**talk._encode(HI)).logits


def test_streamed_pieces_equal_the_greedy_answer(talk: ChatModel) -> None:
    pieces = list(talk.stream(HI, SHORT))
    prompt = talk._encode(HI)
    expected = talk.model.generate(**prompt, max_new_tokens=24, do_sample=False)
    new = expected[0, prompt["input_ids"].shape[1] :]
    assert "".join(pieces) == talk.tokenizer.decode(new, skip_special_tokens=True)
    assert all(pieces)
    assert talk.tokens == len(new)


@pytest.mark.parametrize("where", ["adapter", "run", "base"])
def test_an_adapter_answers_as_its_merged_export(
    where: str, adapter: Path, run: Path, talk: ChatModel, tiny_untied: Path, tmp_path: Path
) -> None:
    """In fp32, because an export in bf16 rounds the merged weights once more."""
    source, base = {
        "adapter": (adapter, None),
        "run": (run, None),
        "base": (make_adapter(tiny_untied, tmp_path / "untied"), tiny_untied),
    }[where]
    out, named = tmp_path / "export", ("--base", base) if base else ()
    consolidate(source, *named, "--output", out, "--dtype", "fp32")
    mine, merged = ChatModel(find_target(source, base)), ChatModel(find_target(out))
    assert mine.answer(HI, SHORT) == merged.answer(HI, SHORT)
    torch.testing.assert_close(logits(mine), logits(merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(mine), logits(talk), rtol=1e-2)


def test_the_same_seed_gives_the_same_sample(talk: ChatModel) -> None:
    drawn = Options(max_new_tokens=24, temperature=1.5, top_p=0.95, seed=5)
    first = talk.answer(HI, drawn)
    assert first == talk.answer(HI, drawn)
    assert first != talk.answer(HI, drawn.with_text("seed", "6"))
    free = drawn.with_text("seed", "none")
    assert talk.answer(HI, free) != talk.answer(HI, free)


def test_generate_receives_the_options(talk: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    def generate(**arguments: Any) -> None:
        received.update(arguments, seed=torch.initial_seed())
        arguments["streamer"].end()

    monkeypatch.setattr(talk.model, "generate", generate)
    sampled: dict[str, Any] = {"max_new_tokens": 7, "temperature": 0.3, "top_p": 0.4, "seed": 11}
    assert list(talk.stream(HI, Options(**sampled))) == []
    assert received["do_sample"] is True
    assert {name: received[name] for name in sampled} == sampled
    assert received["input_ids"].tolist() == talk._encode(HI)["input_ids"].tolist()
    received.clear()
    assert list(talk.stream(HI, Options(max_new_tokens=7, top_p=0.4, seed=0))) == []
    assert (received["max_new_tokens"], received["do_sample"], received["seed"]) == (7, False, 0)
    assert not received.keys() & {"temperature", "top_p"}, "transformers would warn"


def test_stopping_ends_an_answer_early(talk: ChatModel) -> None:
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 5

    list(talk.stream(HI, Options(max_new_tokens=400), stopped))
    assert talk.tokens == 5


def test_closing_the_iterator_ends_the_thread(talk: ChatModel) -> None:
    pieces = talk.stream(HI, Options(max_new_tokens=400))
    next(pieces)
    pieces.close()
    assert talk.tokens < 400
    assert not [each for each in threading.enumerate() if each.name == "generate"]


def test_an_exception_in_the_thread_reaches_the_caller(
    talk: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("by the model")

    monkeypatch.setattr(talk.model, "generate", broken)
    with pytest.raises(ZeroDivisionError, match="by the model"):
        list(talk.stream(HI))

    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(talk.model, "generate", full)
    with pytest.raises(UserError, match="not enough memory"):
        list(talk.stream(HI))


def test_an_answer_ends_at_the_last_position(talk: ChatModel) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens and the model 512 positions"):
        talk.answer([{"role": "user", "content": "x" * 600}])
    list(talk.stream([{"role": "user", "content": "x" * 450}], Options(max_new_tokens=10**6)))
    assert talk.tokens < 60


def test_a_chat_template_error_gives_a_clear_message(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(UserError, match="no system here"):
        ChatModel(find_target(folder)).answer(HI)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="has no chat template"):
        ChatModel(find_target(folder))


def test_the_end_token_used_in_training_ends_an_answer(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert ChatModel(find_target(folder))._end_token_ids() == [2, 0]


def test_incomplete_models_are_refused(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"lacks model\.layers\.2"):
        ChatModel(find_target(folder))
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match="belongs to another model"):
        ChatModel(find_target(adapter, folder))
    edit(folder / "config.json", num_hidden_layers=2, model_type="unheard_of")
    with pytest.raises(UserError, match="cannot be loaded"):
        ChatModel(find_target(folder))
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    edit(folder / "config.json", model_type="llama")
    with pytest.raises(UserError, match="cannot be loaded"):
        ChatModel(find_target(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        ChatModel(find_target(folder))


def test_remote_code_of_a_model_is_not_run(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    edit(folder / "config.json", model_type="own", auto_map={
        "AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model",
    })  # fmt: skip
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        ChatModel(find_target(folder))
    assert not (tmp_path / "ran").exists()


CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NEXT_TURN = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, END), (NEXT_TURN, START)], ids=["own-token", "next-turn"]
)
@pytest.mark.parametrize("where", ["base", "checkpoint"])
def test_an_answer_stops_where_the_template_ends_it(
    template: str, end: int, where: str, tmp_path: Path
) -> None:
    """Although the model's generation config lists only <|endoftext|>."""
    base = path = make_base(tmp_path / "base", end, template if where == "base" else None)
    if where == "checkpoint":
        (tmp_path / "mine.jinja").write_text(template)
        path = make_checkpoint(base, tmp_path / "step-000002", str(tmp_path / "mine.jinja"))
    model = ChatModel(find_target(path))
    assert model.answer(HI, SHORT) == "h"
    assert model.tokens == 2


@pytest.mark.parametrize("end", [EOS, START, END])
def test_an_answer_stops_at_each_end_of_the_generation_config(end: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", end, "{% for m in messages %}{{ m.content }}{% endfor %}")
    edit(base / "generation_config.json", eos_token_id=[EOS, START, END])
    model = ChatModel(find_target(base))
    assert model.answer(HI, SHORT) == "h"
    assert model.tokens == 2


def test_the_tokenizer_of_a_checkpoint_may_leave_its_class_to_the_base(tmp_path: Path) -> None:
    """GPT-2's tokenizer_config.json names no class."""
    base = make_base(tmp_path / "base")
    edit(base / "config.json", eos_token_id=EOS)
    (base / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    step = make_checkpoint(base, tmp_path / "step-000002", "chatml")
    assert ChatModel(find_target(step)).answer(HI, SHORT) == "h"
