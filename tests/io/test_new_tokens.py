"""A model folder with new tokens: its tokenizer, its rows, its files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from launcher.errors import UserError
from launcher.folders.extended_model import (
    RECORD,
    describe_extension,
    extended_folder,
    read_record,
)
from launcher.folders.vocabulary import embedding_rows
from launcher.io.new_tokens import base_model_folder, extend
from launcher.io.readers.model_folder import read_model
from launcher.model.tiny import make_tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 259  # of the tiny model
TOKENS = ["<|tool|>", "<note>"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    make_tiny(tmp_path / "base")
    return tmp_path / "base"


def split(folder: Path) -> None:
    """Save an untied model in several files with an index."""
    make_tiny(folder, tie=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()


def grow(base: Path, rows: int, tie: bool = True) -> None:
    """Give the model spare rows, whose values differ from all others."""
    tensors = load_file(base / "model.safetensors")
    spare = torch.full((rows - ROWS, 48), 7.0, dtype=torch.bfloat16)
    for name in (EMBEDDING,) if tie else (EMBEDDING, HEAD):
        tensors[name] = torch.cat([tensors[name], spare])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": rows}
    (base / "config.json").write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read_all() for name, tensor in read_model(folder).tensors.items()}


def mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.float().mean(0)


def test_new_rows_are_the_mean_and_old_ones_stay(base: Path) -> None:
    folder = extend(base, TOKENS)
    before, after = tensors_of(base), tensors_of(folder)
    assert embedding_rows(folder) == len(after[EMBEDDING]) == 320, "the next multiple of 64"
    assert torch.equal(after[EMBEDDING][:ROWS], before[EMBEDDING])
    new = after[EMBEDDING][ROWS:].float()
    torch.testing.assert_close(new, mean(before[EMBEDDING]).expand_as(new), rtol=1e-2, atol=1e-6)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if name != EMBEDDING)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_untied_head_gets_its_own_mean_and_other_files_are_links(base: Path) -> None:
    folder = base.with_name("split")
    split(folder)
    extended = extend(folder, TOKENS)
    before, after = tensors_of(folder), tensors_of(extended)
    for name in (EMBEDDING, HEAD):
        new = after[name][ROWS:].float()
        assert new.shape == (320 - ROWS, 48)
        torch.testing.assert_close(new, mean(before[name]).expand_as(new), rtol=1e-2, atol=1e-6)
    assert not torch.equal(after[EMBEDDING][-1], after[HEAD][-1])
    index = json.loads((extended / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in after.values())
    assert index["metadata"]["total_size"] == total
    resized = {index["weight_map"][name] for name in (EMBEDDING, HEAD)}
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files > resized
    for file in files:
        link = extended / file
        assert link.is_symlink() is (file not in resized)
        assert link.is_file()
        if link.is_symlink():
            assert link.readlink() == (folder / file).resolve()


def test_spare_rows_are_used_before_the_model_grows(base: Path) -> None:
    """Only the rows of the new tokens change, and rows without a token do not count."""
    grow(base, 264)
    folder = extend(base, TOKENS)
    before, after = tensors_of(base)[EMBEDDING], tensors_of(folder)[EMBEDDING]
    assert after.shape == before.shape
    new = after[ROWS : ROWS + 2].float()
    torch.testing.assert_close(new, mean(before[:ROWS]).expand_as(new), rtol=1e-2, atol=1e-6)
    others = [*range(ROWS), *range(ROWS + 2, 264)]
    assert torch.equal(after[others], before[others])
    assert describe_extension(folder).startswith("2 added (<|tool|>, <note>); embedding: 264 rows;")


def test_a_head_with_a_bias_gets_new_entries(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.bias"] = torch.arange(ROWS, dtype=torch.float32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    bias = tensors_of(extend(base, TOKENS))["lm_head.bias"]
    assert torch.equal(bias[:ROWS], tensors["lm_head.bias"])
    assert bias[ROWS:].tolist() == [129.0] * (320 - ROWS)


def test_the_tokenizer_reads_each_new_token_as_one(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(extend(base, TOKENS))
    ids = tokenizer("a<|tool|>b<note>c", add_special_tokens=False)["input_ids"]
    assert ids[1::2] == [ROWS, ROWS + 1]
    assert tokenizer.decode(ids) == "a<|tool|>b<note>c"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<note>c"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_a_known_token_gets_no_row(base: Path) -> None:
    folder = extend(base, ["<|im_end|>"])
    assert torch.equal(tensors_of(folder)[EMBEDDING], tensors_of(base)[EMBEDDING])
    assert read_record(folder)["known"] == ["<|im_end|>"]
    assert "1 that the tokenizer has already (<|im_end|>)" in describe_extension(folder)


def test_a_known_token_without_a_row_gets_one(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<late>")])
    tokenizer.save_pretrained(base)
    folder = extend(base, ["<late>"])
    assert embedding_rows(folder) == 320
    assert len(AutoTokenizer.from_pretrained(folder)) == ROWS + 1


def test_it_is_made_once_and_found_again(base: Path) -> None:
    folder = extend(base, TOKENS)
    made = (folder / "model.safetensors").stat()
    assert base_model_folder(str(base), None, add_tokens=TOKENS) == folder
    assert extend(folder, TOKENS) == extended_folder(folder, TOKENS) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    assert base_model_folder(str(base), None) == base
    assert extended_folder(base, TOKENS[::-1]) != folder
    assert not list(folder.parent.glob(".*.partial"))


def test_another_base_at_the_same_path_is_another_folder(base: Path) -> None:
    folder = extend(base, TOKENS)
    make_tiny(base, seed=5)
    again = extend(base, TOKENS)
    assert again != folder
    assert torch.equal(tensors_of(again)[EMBEDDING][:ROWS], tensors_of(base)[EMBEDDING])


def test_the_base_is_not_changed(base: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    extend(base, TOKENS)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_an_embedding_of_an_unknown_name_is_refused_and_leaves_nothing(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.words.weight"] = tensors.pop(EMBEDDING)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.add_tokens: 0 tensors of .*resize_token_emb"):
        extend(base, TOKENS)
    assert [path for path in extended_folder(base, TOKENS).parent.iterdir() if path.is_dir()] == []


def test_nested_configs_get_the_new_size(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    nested = {"text_config": {"vocab_size": config.pop("vocab_size")}}
    (base / "config.json").write_text(json.dumps(config | nested))
    assert embedding_rows(base) == ROWS
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(tokenizer) == ROWS
    folder = extend(base, TOKENS)
    content = json.loads((folder / "config.json").read_text())
    assert content["text_config"]["vocab_size"] == embedding_rows(folder) == 320
    assert "vocab_size" not in content


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("tokenizer.json", lambda file: file.write_text("")),
        ("config.json", Path.unlink),
        (RECORD, lambda file: file.write_text("[]")),
        (RECORD, lambda file: file.write_text('{"files": {"config.json": 3}}')),
    ],
)
def test_a_damaged_folder_is_named_and_made_anew(
    base: Path, name: str, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = extend(base, TOKENS)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert extend(base, TOKENS) == folder
    assert capsys.readouterr().err == ""
    damage(folder / name)
    os.utime(folder, (1e9, 1e9))
    if (folder / RECORD).is_file():
        os.utime(folder / RECORD, (1e9, 1e9))  # of an earlier start
    assert extend(base, TOKENS) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    said = capsys.readouterr().err
    assert name in said
    assert "rebuilt" in said
