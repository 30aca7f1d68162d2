"""The table of runs: a damaged file is named in its line, and hides no other run."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest

from launcher.cluster import control, runs_table
from launcher.config import store
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.run import RunDir
from launcher.run import processes, started_by, sweep
from tests.helpers.compose import composed

DAMAGES = {
    "config.yaml": ("", "\0", "3", "model: [", "training: 3\n", "[" * 9999),
    "logs/attempt-1/status.json": ("", "{", "[]", "{}", '{"state": 3}', '{"state": ""}', "\0"),
    "logs/attempt-1/steps.json": ("", "{}", '{"total_steps": "many"}', '{"total_steps": 1.5}'),
    "logs/attempt-1/job.json": ("", "[1]", "{}"),
    "slurm.json": ("", "{}", '{"job": null}', '{"job": []}'),
    "metrics.jsonl": ("nonsense\n", '{"step": "1"}\n', "[]\n\n"),
}


@cache
def frozen(*overrides: str) -> str:
    return store.dump(composed("training.max_steps=9", *overrides))


def make_run(path: Path, *overrides: str) -> RunDir:
    run = RunDir(path)
    run.logs.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.config.write_text(frozen(*overrides))
    run.metrics.write_text(
        '{"step": 1, "loss": 2.0, "time": 1.0}\n{"step": 1, "eval_loss": 1.5}\n'
        '{"step": 2, "loss": 1.25, "time": 2.0}\n'
    )
    manifest.write_json(run.status, {"state": "finished", "exit_code": 0})
    return run


def rows(text: str) -> list[dict[str, str]]:
    """The cells of each line, by the columns of the head."""
    head, *lines = text.splitlines()
    starts = [(match.start(), match[0]) for match in re.finditer(r"\S+", head)]
    ends = [start for start, _ in starts[1:]] + [None]
    return [
        {name: line[start:end].strip() for (start, name), end in zip(starts, ends, strict=True)}
        for line in lines
    ]


def test_the_table_shows_the_end_of_each_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    (row,) = rows(runs_table.format_table(tmp_path))
    assert row == {
        "run": "a", "state": "finished", "attempt": "1", "step": "2/9", "loss": "1.2500",
        "eval_loss": "1.5000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGES.items() for text in texts], ids=repr
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(
    tmp_path: Path, name: str, text: str
) -> None:
    make_run(tmp_path / "good")
    odd = make_run(tmp_path / "odd")
    if name == "metrics.jsonl":
        odd.metrics.write_text(odd.metrics.read_text() + text)
    else:
        (odd.path / name).write_text(text)
    good, found = sorted(rows(runs_table.format_table(tmp_path)), key=lambda row: row["run"])
    assert (good["state"], good["step"], good["damaged"]) == ("finished", "2/9", "")
    assert found["damaged"] == name
    assert found["state"] == ("damaged" if "status" in name else "finished")
    assert found["step"] == ("2" if name.endswith(("config.yaml", "steps.json")) else "2/9")
    assert (found["loss"], found["eval_loss"]) == ("1.2500", "1.5000")


def test_a_damaged_run_of_a_sweep_does_not_hide_its_settings(tmp_path: Path) -> None:
    manifest.write_json(tmp_path / sweep.INDEX, {"runs": 3})
    for number, rate in enumerate(("0.5", "0.25", "0.125")):
        make_run(tmp_path / str(number), f"optimizer.learning_rate={rate}")
    (tmp_path / "1/config.yaml").write_text("")
    (tmp_path / sweep.INDEX).write_text("")
    (tmp_path / "2.bak").mkdir()
    found = rows(runs_table.format_table(tmp_path))
    assert [row["run"] for row in found] == ["0", "1", "2"]
    assert [row["optimizer.learning_rate"] for row in found] == ["0.5", "", "0.125"]
    assert [row["damaged"] for row in found] == ["", "config.yaml", ""]


def test_stopping_names_a_damaged_file_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a")
    run.submitted.write_text("{")
    with pytest.raises(UserError, match="a is not running: its state is finished"):
        list(control.request_stop(run.path))
    assert "slurm.json cannot be read" in capsys.readouterr().err


def test_a_run_with_a_pipe_of_that_name_is_not_stopped_and_no_attempt_of_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.setattr(processes, "living", lambda run: [run])
    os.mkfifo(run.stop)
    with pytest.raises(UserError, match=r"a/stop cannot be written: .* → remove it"):
        list(control.request_stop(run.path))
    os.mkfifo(run.path / "logs/.lock")
    with pytest.raises(UserError, match="a cannot be locked"), run.lock():
        pass


def test_a_run_folder_without_its_configuration_names_a_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run.checkpoints / "step-000002").mkdir()
    run.config.rename(run.checkpoints / "step-000002/config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml → copy that of a checkpoint: .*000002"):
        control.resume_run(run.path)


def test_under_torchrun_a_resume_names_what_every_rank_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.setattr(started_by, "is_rank", lambda: True)
    with pytest.raises(UserError, match=r"-m launcher\.train --config-path .*/a --config-name"):
        control.resume_run(run.path)


def test_steps_are_unknown_where_metrics_cannot_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs/a")
    run.metrics.unlink(missing_ok=True)
    run.metrics.symlink_to("/etc/hostname")
    (row,) = rows(runs_table.format_table(tmp_path / "runs"))
    assert row["step"] == "?/9"


def test_resuming_with_a_damaged_configuration_names_the_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    step = run.checkpoints / "step-000002"
    step.mkdir()
    (step / "config.yaml").write_bytes(run.config.read_bytes())
    manifest.write(step / "manifest.json", {"step": 2, "content": "all", "base": {}})
    run.config.write_text("model: [")
    with pytest.raises(UserError, match=r"is not a frozen (?s:.*)→ copy that of a .*step-00"):
        control.resume_run(run.path)
    (step / "manifest.json").write_text(json.dumps({"step": 2, "files": {}}))
    with pytest.raises(UserError, match="has no finished checkpoint; step-000002 is damaged"):
        control.resume_run(run.path)
