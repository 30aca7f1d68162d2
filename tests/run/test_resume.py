"""Which settings a resumed run may change; the message about others sets them back."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from launcher.config import store
from launcher.config.compose import compose
from launcher.config.overrides import apply_changes
from launcher.folders import manifest
from launcher.folders.checkpoint import Checkpoint
from launcher.run import resume
from launcher.run.resume import compare_configs
from tests.helpers.parts import Case


def checkpoint(folder: Path, *overrides: str) -> Checkpoint:
    """A checkpoint of a run with these overrides, without its tensors."""
    path = folder / "checkpoints/step-000004"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(store.dump(compose([*overrides])))
    manifest.write(path / "manifest.json", {"step": 4, "content": "all", "base": {}})
    return Checkpoint(path)


def test_rows_that_were_read_as_the_demo_s_are_set_back(tmp_path: Path) -> None:
    """Former versions composed data.path=FILE with the settings of the bundled rows."""
    found = checkpoint(tmp_path, "data=demo", "data.path=rows.jsonl", "data.max_length=128")
    (message,) = resume.find_problems(found, compose(["data.path=rows.jsonl"]))
    assert message == (
        "step-000004 was trained with other settings (data.format: messages → auto; "
        "data.max_length: 128 → 2048), so resuming would not continue that training → "
        "data.format=messages data.max_length=128, or resume_force=true"
    )
    words = ["data.path=rows.jsonl", "data.format=messages", "data.max_length=128"]
    assert resume.find_problems(found, compose(words)) == []


def test_the_fix_sets_every_kind_of_setting_back(tmp_path: Path) -> None:
    before = (
        *("scheduler=linear", "scheduler.warmup_steps=2", "training.epochs=2", "model=tiny"),
        *("data.columns={output: a b}", "optimizer.betas=[0.8,0.9]"),
    )
    now = (
        *("scheduler=constant", "training.max_steps=7", "model=tiny"),
        *("data.columns={output: c, system: d}", "optimizer.betas=[0.9,0.9]"),
    )
    found = checkpoint(tmp_path, *before)
    (message,) = resume.find_problems(found, compose([*now]))
    fix = shlex.split(message.rpartition(" → ")[2].removesuffix(", or resume_force=true"))
    assert "scheduler=linear" in fix
    assert "~data.columns.system" in fix
    assert resume.find_problems(found, compose(apply_changes([*now], fix))) == []


def test_a_stream_does_not_compare_its_rows(tmp_path: Path) -> None:
    words = ("data.path=rows.jsonl", "data.streaming=true")
    found = checkpoint(tmp_path, *words, "data.too_long=cut")
    (message,) = resume.find_problems(found, compose([*words]))
    assert "→ data.too_long=cut, or resume_force=true" in message
    stored = checkpoint(tmp_path / "stored", words[0], "data.too_long=cut")
    assert resume.find_problems(stored, compose([words[0]])) == []


def test_settings_of_another_file_are_not_deleted(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "method=full", "scheduler=constant")
    (message,) = resume.find_problems(found, compose(["method=lora", "scheduler=cosine"]))
    fix = shlex.split(message.rpartition(" → ")[2].partition(", or ")[0])
    assert not [word for word in fix if word.startswith("~")]
    changed = compose(apply_changes(["method=lora", "scheduler=cosine"], fix))
    assert resume.find_problems(found, changed) == []


def test_other_tensors_cannot_be_forced(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "method.rank=4")
    (message,) = resume.find_problems(found, compose(["method.rank=8", "resume_force=true"]))
    assert message.endswith(
        "contains other tensors (method.rank: 4 → 8) → method.rank=4, or start from scratch with "
        "resume=none"
    )


def test_new_tokens_are_part_of_the_tensors_and_older_runs_have_none(tmp_path: Path) -> None:
    config = Case(tmp_path, tmp_path).config()
    before = yaml.safe_load(store.dump(config))
    del before["model"]["add_tokens"]  # as a run before this setting was frozen
    frozen = tmp_path / "config.yaml"
    frozen.write_text(yaml.safe_dump(before))
    same = compare_configs(frozen, config)
    assert (same.allowed, same.breaking, same.incompatible) == ([], [], [])
    other = replace(config, model=replace(config.model, add_tokens=["<a>"]))
    assert compare_configs(frozen, other).incompatible == ["model.add_tokens: [] → ['<a>']"]


def test_to_ask_for_a_resumption_is_no_difference(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "training.stop_after_steps=2")
    now = compare_configs(found.config, compose(["resume=auto", "resume_force=true"]))
    assert now.allowed == ["training.stop_after_steps: 2 → None"]
