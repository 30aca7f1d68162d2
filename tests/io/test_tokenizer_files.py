"""A tokenizer with another template and end token keeps every other byte of the base's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.errors import UserError
from launcher.io.tokenizer_files import with_template
from tests.helpers.ends import END, make_base

TEMPLATE = "{{ messages[0].content }} ‹ü›\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def write(folder: Path, name: str, content: Any, **form: Any) -> None:
    (folder / name).write_text(json.dumps(content, **form))


def changed_lines(before: bytes, after: bytes) -> list[str]:
    old, new = before.decode().splitlines(), after.decode().splitlines()
    assert len(old) == len(new)
    return [line.strip() for was, line in zip(old, new, strict=True) if was != line]


def test_only_the_end_token_changes(base: Path) -> None:
    for name in ("merges.txt", "vocab.json", "added_tokens.json", "tokenizer.model"):
        (base / name).write_bytes(b'{"x":1}\r\n')
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    files = with_template(base, TEMPLATE, "<|im_end|>")
    assert files["chat_template.jinja"].decode() == TEMPLATE
    settings, special = "tokenizer_config.json", "special_tokens_map.json"
    assert changed_lines(before[settings], files[settings]) == ['"eos_token": "<|im_end|>",']
    assert changed_lines(before[special], files[special]) == ['"content": "<|im_end|>",']
    others = files.keys() - {"chat_template.jinja", settings, special}
    assert others >= {"tokenizer.json", "merges.txt", "vocab.json", "tokenizer.model"}
    assert all(files[name] == before[name] for name in others)
    assert not files.keys() & {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("end", [None, "<|endoftext|>"])
def test_without_another_end_token_only_the_template_changes(base: Path, end: str | None) -> None:
    files = with_template(base, TEMPLATE, end)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert files[name] == (base / name).read_bytes()


@pytest.mark.parametrize("key", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("old", ["old", [{"name": "default", "template": "old"}]])
def test_a_template_within_json_is_replaced_there(base: Path, key: str, old: object) -> None:
    write(base, key, {"chat_template": old, "x": 1}, indent=4)
    files = with_template(base, TEMPLATE, None)
    assert json.loads(files[key]) == {"chat_template": TEMPLATE, "x": 1}
    assert files[key].startswith(b'{\n    "')
    assert files["chat_template.jinja"].decode() == TEMPLATE


def test_the_end_token_keeps_the_form_of_the_old_one_and_its_own_flags(base: Path) -> None:
    fast = read(base, "tokenizer.json")
    fast["added_tokens"][END]["rstrip"] = True
    write(base, "tokenizer.json", fast)
    old = {"__type": "AddedToken", "content": "<|endoftext|>", "rstrip": False, "lstrip": False}
    write(base, "tokenizer_config.json", {"eos_token": old, "z": "é"}, indent=1)
    write(base, "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    files = with_template(base, TEMPLATE, "<|im_end|>")
    new = {**old, "content": "<|im_end|>", "rstrip": True}
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": new, "z": "é"}
    assert files["special_tokens_map.json"] == b'{"eos_token": "<|im_end|>"}'


def test_an_end_token_that_is_not_special_becomes_special_everywhere(base: Path) -> None:
    fast, settings = read(base, "tokenizer.json"), read(base, "tokenizer_config.json")
    fast["added_tokens"][END]["special"] = False
    settings["added_tokens_decoder"][str(END)]["special"] = False
    write(base, "tokenizer.json", fast, indent=2)
    write(base, "tokenizer_config.json", settings, indent=2)
    before = (base / "tokenizer.json").read_bytes()
    files = with_template(base, TEMPLATE, "<|im_end|>")
    assert changed_lines(before, files["tokenizer.json"]) == ['"special": true']
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert all(token["special"] for token in decoder.values())
    for name, content in files.items():
        (base / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode([END, 5, END], skip_special_tokens=True) == tokenizer.decode([5])


def test_an_end_token_of_the_vocabulary_is_added_with_its_id(base: Path) -> None:
    fast, settings = read(base, "tokenizer.json"), read(base, "tokenizer_config.json")
    del fast["added_tokens"][END], settings["added_tokens_decoder"][str(END)]
    write(base, "tokenizer.json", fast)
    write(base, "tokenizer_config.json", settings)
    for name, content in with_template(base, TEMPLATE, "<|im_end|>").items():
        (base / name).write_bytes(content)
    assert [each["id"] for each in read(base, "tokenizer.json")["added_tokens"]] == [0, 1, 2]
    entry = read(base, "tokenizer_config.json")["added_tokens_decoder"][str(END)]
    assert entry["content"] == "<|im_end|>"
    assert entry["special"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer("a<|im_end|>", add_special_tokens=False)["input_ids"][1:] == [END]
    assert tokenizer.eos_token_id == END


def test_a_unigram_vocabulary_gives_the_id_by_its_order(base: Path) -> None:
    write(base, "tokenizer.json", {"model": {"vocab": [["a", 0.0], ["</end>", -1.0]]}})
    (added,) = json.loads(with_template(base, TEMPLATE, "</end>")["tokenizer.json"])["added_tokens"]
    assert (added["id"], added["special"]) == (1, True)


def test_a_base_that_leaves_eos_to_its_class_names_it_in_the_settings(base: Path) -> None:
    write(base, "tokenizer_config.json", {"model_max_length": 1024})
    (base / "special_tokens_map.json").unlink()
    files = with_template(base, TEMPLATE, "<|im_end|>")
    expected = {"model_max_length": 1024, "eos_token": "<|im_end|>"}
    assert json.loads(files["tokenizer_config.json"]) == expected
    assert "special_tokens_map.json" not in files
    assert files["tokenizer.json"] == (base / "tokenizer.json").read_bytes()


def test_a_broken_file_is_named(base: Path) -> None:
    (base / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
        with_template(base, TEMPLATE, "<|im_end|>")
