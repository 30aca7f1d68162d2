"""Conversations need a chat template, and what ends its answers becomes the end token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.model.tokenizer import load_tokenizer, trained_files
from tests.helpers.commands import losses, shardway
from tests.helpers.ends import END, EOS, START, make_base


@pytest.fixture
def mute(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model without a chat template."""
    shutil.copytree(tiny, tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    return tmp_path / "mute"


def test_conversations_need_a_template(mute: Path) -> None:
    """For a hub id, this is known only after the tokenizer is loaded."""
    with pytest.raises(UserError, match=r"has no chat template; put a chat_template\.jinja"):
        load_tokenizer(mute, trust_remote_code=False)
    assert load_tokenizer(mute, trust_remote_code=False, chat=False).chat_template is None


def test_raw_text_needs_no_template(mute: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("once upon a time\n" * 40)
    done = shardway(
        *("train", "model=tiny", "model.name_or_path=./mute", "data=pretrain", "strategy=single"),
        *("data.path=book.txt", "data.max_length=32", "training.micro_batch_size=4"),
        *("training.epochs=null", "training.max_steps=2", "run_dir=run", "tracking.plot=false"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 2


TURNS = "{% for m in messages %}<|im_start|>{{ m.content }}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURNS + "<|im_end|>\n{% endfor %}", END),
        (TURNS + "{{ eos_token }}{% endfor %}", EOS),
        (TURNS + "\n<|im_start|>{% endfor %}", START),  # written by the template itself
        (TURNS + "{% endfor %}", EOS),  # the next turn ends an answer, but not a text
        (TURNS + "\n{% endfor %}", EOS),
    ],
)
def test_the_token_that_a_template_writes_after_an_answer_becomes_eos(
    tmp_path: Path, template: str, end: int
) -> None:
    base, file = make_base(tmp_path / "base"), tmp_path / "mine.jinja"
    file.write_text(template)
    tokenizer = load_tokenizer(base, trust_remote_code=False, template=str(file))
    assert tokenizer.eos_token_id == end
    settings = json.loads(trained_files(base, tokenizer)["tokenizer_config.json"])
    assert settings["eos_token"] == tokenizer.eos_token


def test_an_end_token_that_is_not_special_becomes_special(tmp_path: Path) -> None:
    """In the training's tokenizer as in the saved files."""
    base = make_base(tmp_path / "base")
    for name, key, at in [
        ("tokenizer.json", "added_tokens", END),
        ("tokenizer_config.json", "added_tokens_decoder", str(END)),
    ]:
        content = json.loads((base / name).read_text())
        content[key][at] |= {"special": False, "rstrip": True}
        (base / name).write_text(json.dumps(content))
    assert not load_tokenizer(base, False, chat=False).added_tokens_decoder[END].special
    tokenizer = load_tokenizer(base, False, template="chatml")
    assert tokenizer.decode([5, END], skip_special_tokens=True) == tokenizer.decode([5])
    files = trained_files(base, tokenizer)
    (token,) = [t for t in json.loads(files["tokenizer.json"])["added_tokens"] if t["id"] == END]
    assert (token["special"], token["rstrip"]) == (True, True)
    assert tokenizer.added_tokens_decoder[END].rstrip


def test_the_files_of_a_tokenizer_whose_end_stays_are_the_base_s(tmp_path: Path) -> None:
    """Also if the end token is known only to the tokenizer's class."""
    base, file = make_base(tmp_path / "base"), tmp_path / "mine.jinja"
    file.write_text(TURNS + "{{ eos_token }}{% endfor %}")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (base / "special_tokens_map.json").unlink()
    files = trained_files(base, load_tokenizer(base, False, template=str(file)))
    assert files.pop("chat_template.jinja").decode() == file.read_text()
    assert files == {name: (base / name).read_bytes() for name in files}


def test_a_template_that_refuses_an_answer_is_named(tmp_path: Path) -> None:
    base, file = make_base(tmp_path / "base"), tmp_path / "mine.jinja"
    file.write_text("{{ raise_exception('no answers') }}")
    with pytest.raises(UserError, match=r"mine\.jinja cannot write a question .* no answers"):
        load_tokenizer(base, False, template=str(file))
