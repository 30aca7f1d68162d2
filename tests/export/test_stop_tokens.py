"""Generation with an export stops where the trained chat template ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher.folders import manifest, paths
from launcher.folders.checkpoint import MANIFEST
from tests.helpers.chat import edit
from tests.helpers.ends import END, EOS, START, make_base, make_checkpoint
from tests.helpers.exports import consolidate, contents, make_adapter

CHATML = paths.templates()["chatml"].read_text()
GLM = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"  # the next turn is the end
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = "model.safetensors"


def export_of(base: Path, template: str | None, folder: Path) -> Path:
    checkpoint = make_checkpoint(base, folder / "step-000002", template)
    consolidate(checkpoint, "--output", folder / "export")
    return folder / "export"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def generated(folder: Path, tokens: int = 12) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([[5, 6]])
    result: list[int] = model.generate(prompt, max_new_tokens=tokens, do_sample=False)[0, 2:]
    return [int(token) for token in result]


def test_generate_and_gguf_stop_at_the_end_of_the_template(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    assert len(generated(base)) == 12, "the base does not stop"
    export = export_of(base, "chatml", tmp_path)
    found = generated(export)
    assert len(found) == 2
    assert found[-1] == END
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (END, CHATML)
    assert tokenizer.decode(found, skip_special_tokens=True) == "h"
    converted = gguf.SpecialVocab(export)
    assert converted.special_token_ids["eos"] == END
    assert converted.chat_template == CHATML


def test_every_other_byte_is_the_base_s(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "merges.txt").write_bytes(b"#version: 0.2\r\n")
    export = export_of(base, "chatml", tmp_path)
    before, after = contents(base), contents(export)
    changed = {name for name in before if name != WEIGHTS and before[name] != after[name]}
    assert changed == {
        *("config.json", "generation_config.json"),
        *("tokenizer_config.json", "special_tokens_map.json"),
    }
    assert after.keys() - before.keys() == {"chat_template.jinja", "consolidation_manifest.json"}
    for name in ("config.json", "generation_config.json"):
        assert read(export / name) == {**read(base / name), "eos_token_id": [END, EOS]}
    settings = read(export / "tokenizer_config.json")
    assert settings == {**read(base / "tokenizer_config.json"), "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("template", ["chatml", None])
@pytest.mark.parametrize("listed", [END, [EOS, END], [END, EOS]])
def test_a_base_that_lists_the_end_keeps_its_lists(
    tmp_path: Path, listed: object, template: str | None
) -> None:
    base = make_base(tmp_path / "base", template=CHATML)
    for name in ("config.json", "generation_config.json"):
        edit(base / name, eos_token_id=listed, temperature=1e-05)
    export = export_of(base, template, tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert (export / name).read_bytes() == (base / name).read_bytes()
    if template is None:
        for name in TOKENIZER:
            assert (export / name).read_bytes() == (base / name).read_bytes()
        assert not (export / "chat_template.jinja").exists()
    else:
        key = read(export / "tokenizer_config.json")["chat_template"]
        assert key == (export / "chat_template.jinja").read_text() == CHATML


def test_a_generation_config_that_lists_the_end_is_enough(tmp_path: Path) -> None:
    """Llama 3 lists it there and not in config.json."""
    base = make_base(tmp_path / "base", template=CHATML)
    edit(base / "generation_config.json", eos_token_id=[EOS, END])
    export = export_of(base, None, tmp_path)
    for name in (*TOKENIZER, "config.json", "generation_config.json"):
        assert (export / name).read_bytes() == (base / name).read_bytes()
    assert generated(export)[-1] == END


def test_the_template_of_the_base_ends_answers_with_a_token_that_its_list_lacks(
    tmp_path: Path,
) -> None:
    """Qwen's base models have a ChatML template, and stop only at <|endoftext|>."""
    base = make_base(tmp_path / "base", template=CHATML)
    export = export_of(base, None, tmp_path)
    assert read(export / "generation_config.json")["eos_token_id"] == [END, EOS]
    assert generated(export)[-1] == END
    for name in TOKENIZER:
        assert (export / name).read_bytes() == (base / name).read_bytes()


def test_an_answer_that_the_next_turn_ends_stops_there(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", end=START)
    (tmp_path / "glm.jinja").write_text(GLM)
    export = export_of(base, str(tmp_path / "glm.jinja"), tmp_path)
    assert read(export / "generation_config.json")["eos_token_id"] == [START, EOS]
    assert generated(export)[-1] == START
    assert AutoTokenizer.from_pretrained(export).eos_token_id == EOS
    assert (export / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()


def test_a_missing_generation_config_is_made(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    edit(base / "config.json", eos_token_id=[7, EOS], pad_token_id=EOS, bos_token_id=START)
    export = export_of(base, "chatml", tmp_path)
    made = read(export / "generation_config.json")
    assert made == {"bos_token_id": START, "pad_token_id": EOS, "eos_token_id": [END, 7, EOS]}
    assert GenerationConfig.from_pretrained(export).eos_token_id == [END, 7, EOS]


def test_no_generation_config_is_made_if_the_config_lists_the_end(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    edit(base / "config.json", eos_token_id=[EOS, END])
    export = export_of(base, "chatml", tmp_path)
    assert not (export / "generation_config.json").exists()
    assert (export / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_generation_config_without_eos_lists_the_end_and_that_of_the_config(
    tmp_path: Path,
) -> None:
    """transformers does not look into config.json then, and never stops."""
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").write_text('{"top_k": 5}')
    export = export_of(base, "chatml", tmp_path)
    expected = {"top_k": 5, "eos_token_id": [END, EOS]}
    assert read(export / "generation_config.json") == expected


def test_the_text_config_of_a_model_that_sees_is_changed_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    step = make_checkpoint(base, tmp_path / "step-000002", "chatml")
    unknown = ["SeeingForConditionalGeneration"]  # the class of no library
    text_config = {"eos_token_id": EOS, "hidden_size": 48}
    edit(base / "config.json", text_config=text_config, architectures=unknown)
    consolidate(step, "--output", tmp_path / "export")
    config = read(tmp_path / "export/config.json")
    assert config["text_config"] == {"eos_token_id": [END, EOS], "hidden_size": 48}
    assert config["eos_token_id"] == [END, EOS]


def test_the_tokenizer_of_an_older_checkpoint_gets_the_form_of_the_base(tmp_path: Path) -> None:
    """Older versions saved it as transformers writes it, and no end tokens."""
    base = make_base(tmp_path / "base")
    step = make_checkpoint(base, tmp_path / "step-000002", "chatml")
    for name in (*TOKENIZER, "chat_template.jinja"):
        (step / name).unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    tokenizer.save_pretrained(step)
    said = {"step": 2, "content": "all", "base": read(step / MANIFEST)["base"]}
    (step / MANIFEST).unlink()
    manifest.write(step / MANIFEST, said)
    consolidate(step, "--output", tmp_path / "old", "--modelfile")
    new = export_of(base, "chatml", tmp_path / "new")
    for name in (*TOKENIZER, "chat_template.jinja", "config.json", "generation_config.json"):
        assert (tmp_path / "old" / name).read_bytes() == (new / name).read_bytes()
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "old/Modelfile").read_text()


def test_the_tokenizer_that_another_trainer_saved_says_where_answers_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", noise=0.0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    consolidate(adapter, "--output", tmp_path / "out")
    assert generated(tmp_path / "out")[-1] == END
    saved = (adapter / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == saved
    assert f"generation stops at the tokens {END}, {EOS}" in capsys.readouterr().out


def test_one_token_is_not_called_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        edit(base / name, eos_token_id=None)
    export_of(base, "chatml", tmp_path)
    assert f"generation stops at the token {END}\n" in capsys.readouterr().out


def test_what_is_not_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (adapter / "vocab.txt").write_text("a\n")
    consolidate(adapter, "--output", tmp_path / "out")
    assert "cannot be loaded, so eos_token_id stays the base's" in capsys.readouterr().out
    (tmp_path / "none.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    export_of(base, str(tmp_path / "none.jinja"), tmp_path)
    assert "the chat template ends answers with no token" in capsys.readouterr().out


def test_a_folder_that_is_only_sharded_again_is_not_changed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", template=CHATML)
    (base / "config.json").write_text(json.dumps(read(base / "config.json"), indent=7))
    consolidate(base, "--output", tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert {name for name in before if name != WEIGHTS and before[name] != after[name]} == set()
