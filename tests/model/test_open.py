"""What a run starts from: new tokens, and tokens without a row, are in the log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer

from launcher.config import Config
from launcher.folders.vocabulary import embedding_rows, tokens_without_row
from launcher.model.open import open_model
from launcher.model.tiny import make_tiny
from tests.helpers.parts import Case


def config_of(folder: Path, tokens: list[str]) -> Config:
    config = Case(folder, folder).config()
    return replace(config, model=replace(config.model, add_tokens=tokens))


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tokenizer has two tokens more than its embedding."""
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    make_tiny(tmp_path / "late")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "late")
    tokenizer.add_tokens([AddedToken("<late>"), AddedToken("<later>")])
    tokenizer.save_pretrained(tmp_path / "late")
    return tmp_path / "late"


def test_a_model_without_new_tokens_is_its_own_folder(tiny: Path) -> None:
    lines: list[str] = []
    folder, tokenizer = open_model(config_of(tiny, []), lines.append)
    assert (folder, len(tokenizer), lines) == (tiny, 259, [])


def test_tokens_without_a_row_are_listed_with_the_way_out(late: Path) -> None:
    lines: list[str] = []
    folder, tokenizer = open_model(config_of(late, []), lines.append)
    assert folder == late
    (line,) = lines
    assert "the embedding has 259 rows and none for <late>, <later>: data with such" in line
    assert line.endswith('→ model.add_tokens=["<late>","<later>"]')
    rows = embedding_rows(late)
    assert tokens_without_row(tokenizer.get_vocab(), rows) == {"<late>": 259, "<later>": 260}
    assert tokens_without_row(tokenizer.get_vocab(), None) == {}


def test_the_way_out_gives_them_rows(late: Path) -> None:
    lines: list[str] = []
    folder, tokenizer = open_model(config_of(late, ["<late>", "<later>"]), lines.append)
    assert folder != late
    assert tokens_without_row(tokenizer.get_vocab(), embedding_rows(folder)) == {}
    (line,) = lines
    assert "2 that the tokenizer has already (<late>, <later>); embedding: 259 → 320" in line
