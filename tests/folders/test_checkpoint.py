"""Which folders are checkpoints: other names are not looked at, damaged ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.adapter import adapter_folder
from launcher.folders.checkpoint import (
    Checkpoint,
    all_checkpoints,
    describe_skipped,
    finished_checkpoints,
    newest_checkpoint,
)
from launcher.folders.run import RunDir
from launcher.run import retention, sweep
from launcher.run.resume import candidates, named_checkpoint

STRAY = (
    "step-000009.bak", "step-abc", "step-000009 (copy)", "step-5", "step-", "step-0000x9",
    "step-٠٠٠٠٠٩", ".step-000009", "step-000009.partial", "Step-000009", "step-000009\n",
)  # fmt: skip


def save(checkpoints: Path, step: int, **said: Any) -> Checkpoint:
    """A checkpoint of an adapter, without tensors."""
    checkpoint = Checkpoint(checkpoints / f"step-{step:06d}")
    (checkpoint.path / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (checkpoint.path / "adapter" / name).write_text("{}")
    checkpoint.config.write_text("model: {}\n")
    content = {"step": step, "content": "all", "base": {}, "eval_loss": 1.0 + step}
    manifest.write(checkpoint.manifest, {**content, **said})
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with the checkpoints of steps 1 to 4, and what others have left among them."""
    run = RunDir(tmp_path / "run")
    for step in range(1, 5):
        save(run.checkpoints, step)
    for name in STRAY:
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "manifest.json").write_text("{}")
    (run.checkpoints / "step-000008").write_text("a file")
    (run.checkpoints / ".DS_Store").write_bytes(b"\0")
    (run.checkpoints / "step-000007").symlink_to(tmp_path / "nothing")
    return run


def steps(checkpoints: list[Checkpoint]) -> list[int]:
    return [each.step for each in checkpoints]


def test_only_folders_with_the_name_of_a_checkpoint_are_looked_at(run: RunDir) -> None:
    assert steps(all_checkpoints(run.checkpoints)) == [4, 3, 2, 1]
    assert steps(finished_checkpoints(run.checkpoints)) == [4, 3, 2, 1]
    assert steps(candidates("auto", run.checkpoints)) == [4, 3, 2, 1]
    assert adapter_folder(str(run.path)) == run.checkpoints / "step-000004/adapter"


def test_a_step_of_seven_digits_is_newer_than_one_of_six(run: RunDir) -> None:
    save(run.checkpoints, 1_000_000)
    save(run.checkpoints, 999_999)
    assert newest_checkpoint(run.checkpoints).step == 1_000_000
    assert adapter_folder(str(run.path)) == run.checkpoints / "step-1000000/adapter"


def test_only_own_checkpoints_are_deleted(run: RunDir, tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 6)
    (run.checkpoints / "step-000006").symlink_to(elsewhere.path)
    (run.checkpoints / "step-000000").symlink_to("step-000001")
    (run.checkpoints / ".step-000005.partial").mkdir()
    (run.checkpoints / ".step-000005.deleted").write_text("a file")
    before = {path.name for path in run.checkpoints.iterdir()}
    retention.delete_leftovers(run.checkpoints)
    retention.delete_old_checkpoints(run.checkpoints, keep_last=1)
    gone = before - {path.name for path in run.checkpoints.iterdir()}
    assert gone == {".step-000005.partial", "step-000002", "step-000003"}, "1 is the best"
    assert newest_checkpoint(run.checkpoints).step == 4, "one elsewhere is not of this run"
    assert elsewhere.is_finished


DAMAGES: list[Any] = [
    {"content": None}, {"content": "some"}, {"content": ["all"]}, {"step": "4"}, {"step": True},
    {"base": "a model"}, {"eval_loss": "low"}, {"partial": 1}, {"end_tokens": 3},
    {"quantisation": []},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGES, ids=str)
def test_a_manifest_of_wrong_types_is_named_and_the_one_before_is_used(
    run: RunDir, change: dict[str, Any]
) -> None:
    file = run.checkpoints / "step-000004/manifest.json"
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    assert newest_checkpoint(run.checkpoints).step == 3
    (message,) = describe_skipped(run.checkpoints)
    assert message.startswith("step-000004 is damaged and not used: ")
    assert str(file) in message
    assert next(iter(change)) in message
    assert named_checkpoint(str(run.path)).step == 3
    with pytest.raises(UserError, match=r"resume=.*step-000004 is broken: "):
        named_checkpoint(str(file.parent))
    retention.delete_old_checkpoints(run.checkpoints, keep_last=1)
    assert file.is_file()


@pytest.mark.parametrize("text", ["", "model: {}\nrun_dir: x\n", "\0"])
def test_a_damaged_configuration_in_a_checkpoint_is_named(run: RunDir, text: str) -> None:
    (run.checkpoints / "step-000004/config.yaml").write_text(text)
    assert newest_checkpoint(run.checkpoints).step == 3
    assert "config.yaml has" in describe_skipped(run.checkpoints)[0]


def test_without_a_whole_checkpoint_the_damage_is_told(tmp_path: Path) -> None:
    save(tmp_path, 3).config.unlink()
    with pytest.raises(UserError, match=r"no finished checkpoint.*config\.yaml is missing"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_that_is_being_written_is_not_called_damaged(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-000004").mkdir()
    assert describe_skipped(tmp_path) == []


def test_only_folders_with_the_name_of_an_attempt_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.newest_attempt().attempt == 0
    for name in ("attempt-2", "attempt-x", "attempt-3.bak", "attempt-007", "attempt-²", "attempt-"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    (tmp_path / "logs/attempt-9").write_text("a file")
    assert run.newest_attempt().attempt == 2


def test_only_folders_with_the_number_of_a_run_belong_to_a_sweep(tmp_path: Path) -> None:
    for name in ("0", "2", "10", "00", "1.bak", "²", "x", "-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: {}\n")
    (tmp_path / "3").mkdir()
    (tmp_path / "4").write_text("a file")
    assert [run.path.name for run in sweep.list_runs(tmp_path)] == ["0", "2", "10"]
