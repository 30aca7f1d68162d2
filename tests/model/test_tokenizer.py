"""A tokenizer needs a chat template only if rows are conversations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.model.tokenizer import load_tokenizer
from tests.helpers.commands import losses, shardway


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
