"""Valid chat targets, and the error messages for invalid ones. torch is not needed to find them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.chat.target import find_target
from launcher.errors import UserError
from launcher.folders.checkpoint import SCHEME
from launcher.io.new_tokens import extend
from tests.helpers.chat import edit, write_checkpoint


def refusal(path: Path, base: Path | None = None) -> str:
    with pytest.raises(UserError) as raised:
        find_target(path, base)
    return str(raised.value)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copied"))


def test_a_model_and_an_export_are_distinguished(model: Path) -> None:
    assert find_target(model).kind == "model"
    (model / "consolidation_manifest.json").write_text("{}")
    found = find_target(model)
    assert (found.kind, found.model, found.tokenizer) == ("export", model, model)


def test_the_base_of_an_adapter_is_read_or_given(adapter: Path, tiny: Path, model: Path) -> None:
    found = find_target(adapter)
    assert (found.kind, found.model, found.tokenizer) == ("adapter", tiny, tiny)
    assert found.adapter == adapter
    assert find_target(adapter, model).model == model
    assert find_target(adapter).describe() == f"adapter {adapter} on base {tiny}"


def test_a_run_resolves_to_its_newest_finished_checkpoint_and_its_tokenizer(
    run: Path, tiny: Path
) -> None:
    step = run / "checkpoints/step-000002"
    for path in (run, step, step / "adapter"):
        found = find_target(path)
        assert (found.adapter, found.model) == (step / "adapter", tiny)
        assert found.tokenizer == step
        assert not found.notes


def test_a_quantized_run_is_answered_by_its_16_bit_base(
    adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    scheme = {"quant_method": "bitsandbytes"}
    step = write_checkpoint(tmp_path / "step-000002", adapter, tiny, **{SCHEME: scheme})
    (note,) = find_target(step).notes
    assert "16-bit" in note
    assert str(tiny) in note


def test_a_quantized_base_is_refused(adapter: Path, model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "16-bit model; name that with --base DIR" in refusal(adapter, model)


def test_sharded_checkpoints_are_refused_with_the_exact_consolidate_command(
    tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    step = write_checkpoint(run / "checkpoints/step-000002", None, tiny)
    (run / "config.yaml").write_text("a: 1\n")
    assert refusal(run).endswith(f"shardway consolidate {run} --output {run}/export")
    assert refusal(step).endswith(f"shardway consolidate {step} --output DIR")
    shutil.copytree(tiny, run / "export")
    assert refusal(run).endswith(f"its export is {run}/export")
    (tmp_path / "deepspeed/global_step4").mkdir(parents=True)
    assert "shardway consolidate" in refusal(tmp_path / "deepspeed")


def test_unfinished_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    assert "not a finished checkpoint (no manifest.json)" in refusal(
        run / "checkpoints/step-000004"
    )
    shutil.rmtree(run / "checkpoints/step-000002")
    assert "no finished checkpoint yet" in refusal(run)


def test_a_damaged_adapter_of_a_checkpoint_is_refused(run: Path) -> None:
    file = run / "checkpoints/step-000002/adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} has " in refusal(run)


def test_pickles_are_not_opened(model: Path, copied: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickles" in refusal(model)
    assert f"shardway consolidate {model} --output DIR" in refusal(model)
    assert "pickles" in refusal(copied, model)
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    assert f"shardway consolidate {copied} --adapter-only --output DIR" in refusal(copied)


def test_a_missing_base_is_requested_with_base_option(copied: Path, tmp_path: Path) -> None:
    for name in ("owner/model", str(tmp_path / "gone")):
        edit(copied / "adapter_config.json", base_model_name_or_path=name)
        assert name in refusal(copied)
        assert "--base DIR" in refusal(copied)
    edit(copied / "adapter_config.json", base_model_name_or_path=7)
    assert "add --base DIR" in refusal(copied)
    assert f"--base {tmp_path} is not a model folder" in refusal(copied, tmp_path)


def test_invalid_folders_get_a_clear_message(
    model: Path, copied: Path, run: Path, tmp_path: Path
) -> None:
    assert "leave --base" in refusal(model, model)
    assert "is not a folder" in refusal(tmp_path / "gone")
    assert "is not a folder" in refusal(model / "config.json")
    assert "no config.json" in refusal(tmp_path)
    edit(copied / "adapter_config.json", peft_type="IA3")
    assert "peft_type='IA3'" in refusal(copied)
    (copied / "adapter_config.json").write_text("[1]")
    assert "expected an object" in refusal(copied)
    (copied / "adapter_config.json").write_bytes(b"\xff{")
    assert "cannot be read" in refusal(copied)
    edit(run / "checkpoints/step-000002/manifest.json", base="no folder")
    assert "manifest.json is damaged: base is 'no folder'" in refusal(run)
    (model / "config.json").write_text("[" * 100_000)
    assert "cannot be read" in refusal(model)


def test_incomplete_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert "neither model.safetensors nor" in refusal(model)
    index = model / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "lists missing files: model-1.safetensors" in refusal(model)
    index.write_text('{"weight_map": {"a": ["b"]}}')
    assert "lists a in ['b'], which is not a file name" in refusal(model)
    index.write_text('{"weight_map": {"a": "%s"}}' % ("x" * 300))
    assert "which is not a file name" in refusal(model)
    for file in (index, model / "other.safetensors"):
        file.unlink()
    assert "no weights" in refusal(model)


def test_a_model_without_a_tokenizer_is_refused(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "has no tokenizer" in refusal(model)


def test_modules_used_by_the_page_do_not_import_torch() -> None:
    code = (
        "import sys, launcher.chat.remote, launcher.chat.target, launcher.commands.serve, "
        "launcher.commands.chat; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_new_tokens_select_the_base_in_the_cache(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    step, tokens = run / "checkpoints/step-000002", ["<a>", "<b>"]
    base = {"name_or_path": str(tiny), "revision": None, "add_tokens": tokens}
    edit(step / "manifest.json", base=base)
    sentence = refusal(run)
    assert "model.add_tokens=[<a>,<b>]" in sentence
    assert f"shardway consolidate {step} --output DIR" in sentence
    folder = extend(tiny, tokens)
    assert find_target(run).model == find_target(run, tiny).model == folder
    assert find_target(run, folder).model == folder
