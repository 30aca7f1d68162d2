"""Which files of a base are in the export beside its weights, and which tokenizer wins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.plan import make_plan
from launcher.export.source import find_source
from launcher.export.verify import verify
from launcher.folders.model_files import MAX_FILES
from tests.helpers.exports import consolidate, make_adapter, plan_of, stored

# Files of models on the hub, and of training in such folders: those that travel …
TRAVEL = (
    "LICENSE", "NOTICE.txt", "README.md", "preprocessor_config.json", "modeling_mine.py",
    "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "source.spm", "bpe.codes",
    "qwen.tiktoken", "figures/a/speed.png", "2_Dense/model.safetensors", "2_Dense/config.json",
)  # fmt: skip
# … and those that do not, with the reason that is given.
LEFT = {
    "original/": ("original/params.json", "original/consolidated.00.pth"),
    "onnx/": ("onnx/config.json", "onnx/model.onnx"),
    "adapter_model.safetensors": ("adapter_model.safetensors",),
    "optimizer.pt": ("optimizer.pt",),
    "checkpoint-20/": ("checkpoint-20/config.json",),
    ".gitattributes": (".gitattributes",),
    "mine-Q4_K_M.gguf": ("mine-Q4_K_M.gguf",),
    "tf_model.h5": ("tf_model.h5",),
    "all.zip": ("all.zip",),
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def fill(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}" if name.endswith(".json") else "text")


@pytest.fixture
def base(tmp_path: Path, tiny: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


def test_all_files_of_a_base_travel_or_are_listed(tmp_path: Path, base: Path) -> None:
    own = {path.name for path in base.iterdir()}
    fill(base, *TRAVEL, *(name for names in LEFT.values() for name in names))
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    adapter = make_adapter(base, tmp_path / "adapter")
    out = tmp_path / "out"
    consolidate(adapter, "--output", out)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == own | {*TRAVEL, "modules.json", "consolidation_manifest.json"}
    (note,) = [
        line for line in plan_of(adapter).notes if line.startswith(f"not copied from {base}")
    ]
    assert all(f"{name}" in note for name in LEFT)
    assert "model.safetensors," not in note.replace("adapter_model.safetensors,", "")
    assert "whole" in verify(out)
    (out / "2_Dense/config.json").write_text("[]")
    with pytest.raises(UserError, match=r"2_Dense/config\.json"):
        verify(out)


# Files beside the weights of SOURCE: some travel where the base has none of that name.
ODDMENTS = (
    "generation_config.json", "preprocessor_config.json", "added_tokens.json", "README.md",
    "special_tokens_map.json", "additional_chat_templates/tool_use.jinja", "notes.txt",
    "optimizer.pt", "training_args.bin", "extra/data.json", "old/model.safetensors", "mine.gguf",
    "pytorch_model.bin.index.json", "Modelfile", ".hidden", "model-00001-of-00002.safetensors",
)  # fmt: skip


def save_source(kind: str, base: Path, folder: Path) -> Path:
    if kind == "adapter":
        return make_adapter(base, folder)
    if kind == "model":
        return Path(shutil.copytree(base, folder))
    folder.mkdir()
    if kind == "dcp":
        dcp.save({"model": stored(base)}, checkpoint_id=folder)
    else:
        save_file(stored(base), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("with_names", [True, False], ids=["base-has-them", "base-lacks-them"])
@pytest.mark.parametrize("kind", ["adapter", "adapter-only", "model", "dcp", "state"])
def test_each_file_of_source_travels_or_is_listed(
    kind: str, with_names: bool, tmp_path: Path, base: Path
) -> None:
    if with_names:
        fill(base, *ODDMENTS[:6])
    else:
        (base / "generation_config.json").unlink(missing_ok=True)
    source = save_source(kind.removesuffix("-only"), base, tmp_path / "source")
    fill(source, *ODDMENTS)
    for name in ODDMENTS[:5]:
        (source / name).write_text(" {}")  # not the bytes of the base
    words = ["--base", base] if kind in ("dcp", "state") else []
    words += ["--adapter-only"] if kind == "adapter-only" else []
    consolidate(source, *words, "--output", tmp_path / "out")
    named, alone = str(base) if kind in ("dcp", "state") else None, kind == "adapter-only"
    found = find_source(source, named, adapter_only=alone)
    notes = make_plan(found, Options(adapter_only=alone)).notes
    (listed, *_) = [line for line in notes if line.startswith(f"not copied from {source}")]
    for name in ODDMENTS:
        at, file = tmp_path / "out" / name, source / name
        travels = at.is_file() and at.read_bytes() == file.read_bytes()
        top = f"{name.partition('/')[0]}/"
        assert travels != (name in listed or top in listed or "more (" in listed), name
    own = with_names and kind not in ("model", "adapter-only")
    assert (tmp_path / "out/generation_config.json").read_text() == ("{}" if own else " {}")


def test_weights_beside_an_index_are_listed(tmp_path: Path, base: Path) -> None:
    consolidate(base, "--output", tmp_path / "sharded", "--max-shard-size", "30KB")
    shutil.copy(base / "model.safetensors", tmp_path / "sharded/consolidated.safetensors")
    (tmp_path / "sharded/pytorch_model.bin").touch()
    adapter = make_adapter(base, tmp_path / "adapter")
    for plan in (plan_of(tmp_path / "sharded"), plan_of(adapter, base=str(tmp_path / "sharded"))):
        (note,) = [line for line in plan.notes if line.startswith(f"not copied from {tmp_path}/sh")]
        assert note.endswith("consolidated.safetensors, pytorch_model.bin (other weights)")


def test_an_interrupted_export_with_subfolders_is_resumed(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(base, "1_Pooling/config.json")
    with monkeypatch.context() as patch:
        patch.setattr("launcher.export.writing.write._write_manifest", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            consolidate(base, "--output", tmp_path / "out")
    assert (tmp_path / ".out.partial/1_Pooling/config.json").is_file()
    consolidate(base, "--output", tmp_path / "out", "--resume")
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == "{}"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_subfolder_of_thousands_of_files_stays(base: Path) -> None:
    (base / "data").mkdir()
    for number in range(MAX_FILES + 1):
        (base / f"data/{number}").touch()
    assert any("data/ (more than 1,000 files)" in note for note in plan_of(base).notes)


def test_a_damaged_list_of_modules_is_named(base: Path) -> None:
    (base / "modules.json").write_text("[1]")
    with pytest.raises(UserError, match=r"modules\.json is damaged: it is not a list of modules"):
        plan_of(base)


def test_an_adapter_with_settings_alone_keeps_the_vocabulary_of_the_base(
    tmp_path: Path, tiny: Path
) -> None:
    """As a download of *.json leaves it where the vocabulary is in tokenizer.model, and trainers
    that save the template alone."""
    adapter = make_adapter(tiny, tmp_path / "adapter")
    shutil.copy(tiny / "tokenizer_config.json", adapter)
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    consolidate(adapter, "--output", tmp_path / "out", "--modelfile")
    exported, original = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", tiny))
    assert exported.get_vocab() == original.get_vocab()
    assert exported.chat_template == TEMPLATE
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert "<|im_start|>user" not in (tmp_path / "out/Modelfile").read_text()
    (note,) = [line for line in plan_of(adapter).notes if line.startswith("the tokenizer is")]
    assert str(adapter) in note
    assert str(tiny) in note


def test_settings_without_a_vocabulary_may_name_no_new_token(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    new = {"300": {"content": "<tool>", "special": True}}
    settings |= {"added_tokens_decoder": new, "chat_template": TEMPLATE}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"names the token <tool> .*no vocabulary.* → all files"):
        plan_of(adapter)


def add_tokens(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("saved", [False, True], ids=["base", "saved-by-training"])
def test_a_token_without_a_row_in_the_base_is_a_note(
    tmp_path: Path, base: Path, saved: bool
) -> None:
    """As in Gemma 3 1B, and in Llama 2 with a [PAD] token."""
    add_tokens(base, base)
    adapter = make_adapter(base, tmp_path / "adapter")
    if saved:
        add_tokens(base, adapter)
    for source in (adapter, base):
        notes = "\n".join(plan_of(source).notes)
        assert (
            f"has 260 tokens and the embedding 259 rows, as in {base}: text with '[PAD]'" in notes
        )
    consolidate(adapter, "--output", tmp_path / "out")


def test_a_token_without_a_row_that_training_added_is_refused(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    add_tokens(tiny, adapter)
    with pytest.raises(UserError, match=r"has 260 tokens, the embedding 259 rows"):
        plan_of(adapter)


def test_a_hub_base_in_torch_files_is_downloaded(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(tiny, hub, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny / "model.safetensors"), hub / "pytorch_model.bin")
    fill(hub, "tf_model.h5", "LICENSE")
    asked = []

    def download(name: str, *, revision: Any, allow_patterns: Any, ignore_patterns: Any) -> str:
        asked.append(name)
        names = [str(p.relative_to(hub)) for p in hub.rglob("*") if p.is_file()]
        kept = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for each in filter_repo_objects(names, **kept):
            fill(cache, each)
            shutil.copy(hub / each, cache / each)
        return str(cache)

    adapter = make_adapter(tiny, tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    consolidate(adapter, "--base", "some/model", "--output", tmp_path / "out")
    consolidate(adapter, "--output", tmp_path / "expected")
    assert asked == ["some/model", "some/model"]
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "out/LICENSE").is_file()
    assert not (cache / "tf_model.h5").exists()
