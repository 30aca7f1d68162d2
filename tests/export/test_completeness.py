"""An export is compared with the names and shapes of the model's class, and copied files are
parsed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.verify import verify
from launcher.folders import manifest
from launcher.folders.model import CONFIG
from tests.helpers.chat import edit
from tests.helpers.exports import consolidate, plan_of

NORM, HEAD = "model.norm.weight", "lm_head.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (lambda t: t.pop(NORM), f"lacks {NORM} of LlamaForCausalLM"),
    "the head is missing": (lambda t: t.pop(HEAD), f"lacks {HEAD} of LlamaForCausalLM"),
    "a tensor is renamed": (
        lambda t: t.update({"model.norm.wieght": t.pop(NORM)}),
        rf"lacks {NORM} .*\(of other names: model\.norm\.wieght\)",
    ),
    "a tensor has another shape": (
        lambda t: t.update({NORM: torch.ones(47).bfloat16()}),
        rf"{NORM} has the shape \[47\], but in LlamaForCausalLM .* \[48\]",
    ),
    "the vocabulary is another": (
        lambda t: t.update({HEAD: t[HEAD][:-1].contiguous()}),
        rf"{HEAD} has the shape \[258, 48\]",
    ),
}


def changed(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def folder(tiny_untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_untied, tmp_path / "model"))


@pytest.mark.parametrize("name", CHANGES)
def test_an_incomplete_folder_is_neither_exported_nor_whole(
    name: str, folder: Path, tmp_path: Path
) -> None:
    change, message = CHANGES[name]
    export = tmp_path / "export"
    consolidate(folder, "--output", export)
    assert "whole" in verify(export)
    changed(folder, change)
    with pytest.raises(UserError, match=message):
        plan_of(folder)
    changed(export, change)
    renew_manifest(export)
    with pytest.raises(UserError, match=message):
        verify(export)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("generation_config.json", {"cache_implementation": 3}, "generation_config.json does not"),
        ("tokenizer.json", {"model": {"type": "None"}}, "the tokenizer does not load"),
        (CONFIG, {"auto_map": {"AutoModel": "modeling_x.X"}}, "modeling_x.py, which is missing"),
        (CONFIG, {"rope_parameters": "none"}, "config.json does not load in transformers"),
    ],
)
def test_verify_opens_the_small_files_as_a_user_does(
    folder: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    export = tmp_path / "export"
    consolidate(folder, "--output", export)
    assert "config.json, the tokenizer, generation_config.json load" in verify(export)
    edit(export / name, **changes)
    renew_manifest(export)
    with pytest.raises(UserError, match=message):
        verify(export)


def test_what_needs_own_code_is_opened_if_transformers_has_the_class(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "mine.py").write_text("raise SystemExit('code of the folder was run')")
    edit(folder / CONFIG, auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Slow", None]})
    edit(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer")
    consolidate(folder, "--output", tmp_path / "export")
    said = verify(tmp_path / "export")
    assert "the tokenizer was not opened: it needs code of" in said
    assert "config.json, generation_config.json load" in said


def test_an_extracted_adapter_is_opened_by_peft(adapter: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    consolidate(adapter, "--adapter-only", "--output", export)
    assert "adapter_config.json load" in verify(export)
    edit(export / "adapter_config.json", peft_type="OTHER")
    renew_manifest(export)
    with pytest.raises(UserError, match=r"adapter_config\.json does not load"):
        verify(export)


def renew_manifest(export: Path) -> None:
    said = json.loads((export / "consolidation_manifest.json").read_text())
    (export / "consolidation_manifest.json").unlink()
    manifest.write(export / "consolidation_manifest.json", said)


def test_a_tied_head_may_be_missing(tiny: Path, tmp_path: Path) -> None:
    assert HEAD not in load_file(tiny / "model.safetensors")
    consolidate(tiny, "--output", tmp_path / "export")
    assert "not compared" not in verify(tmp_path / "export")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["OtherForCausalLM"]}, "does not have OtherForCausalLM"),
        ({"model_type": "other"}, "does not have LlamaForCausalLM"),
        ({"architectures": None}, "names no class"),
    ],
)
def test_a_class_that_is_not_known_is_not_compared_and_this_is_said(
    folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    edit(folder / CONFIG, **changes)
    changed(folder, lambda tensors: tensors.pop(NORM))
    consolidate(folder, "--output", tmp_path / "export")
    assert any("were not compared" in note and reason in note for note in plan_of(folder).notes)
    assert reason in verify(tmp_path / "export")


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja",
     "special_tokens_map.json", "preprocessor_config.json", "other.json"],
)  # fmt: skip
def test_a_file_that_was_cut_short_is_not_copied(name: str, folder: Path) -> None:
    if not (folder / name).is_file():
        (folder / name).write_text('{"a": 1}')
    assert plan_of(folder).actions
    text = (folder / name).read_text()
    (folder / name).write_text(text[: -len(text) // 3])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        plan_of(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("generation_config.json", {"eos_token_id": "</s>"}),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": 1}}}),
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}),
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}}),
        (CONFIG, {"vocab_size": "many"}),
        (CONFIG, {"num_hidden_layers": 2.5}),
        (CONFIG, {"text_config": []}),
        (CONFIG, {"hidden_act": 7}),
    ],
)
def test_a_value_of_another_type_is_named(name: str, changes: dict[str, Any], folder: Path) -> None:
    edit(folder / name, **changes)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        plan_of(folder)
