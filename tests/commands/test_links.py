"""A run or a checkpoint from somebody else shows, takes and changes no file outside its folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from launcher.chat.target import find_target
from launcher.cluster import control
from launcher.commands import logs, report, runs
from launcher.config import store
from launcher.errors import UserError
from launcher.export.source import find_source
from launcher.folders import manifest
from launcher.folders.checkpoint import Checkpoint
from launcher.folders.links import LeadsOut
from launcher.folders.run import RunDir
from launcher.method.existing_adapter import find_adapter
from launcher.run.resume import named_checkpoint
from tests.helpers.compose import composed

SECRET = "s3cr3t"
LINE = {"step": 1, "loss": 2.0, "time": 1.0}
FILES = (
    "config.yaml", "metrics.jsonl", "slurm.json", "logs/attempt-1/status.json",
    "logs/attempt-1/steps.json", "logs/attempt-1/job.json", "logs/starting", "logs/attempt-1",
    "logs", "logs/attempt-1/rank-00.process.json",
)  # fmt: skip


def make_run(path: Path) -> RunDir:
    run = RunDir(path)
    run.logs.mkdir(parents=True)
    run.checkpoints.mkdir()
    chosen = ("precision=fp32", "strategy=single")  # a run freezes what auto became
    run.config.write_text(store.dump(composed("training.max_steps=9", *chosen)))
    run.metrics.write_text(json.dumps(LINE) + "\n")
    manifest.write_json(run.status, {"state": "finished", "exit_code": 0})
    run.console.write_text("hello\n")
    return run


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is a run and an attempt; a link may lead to it or to any file in it."""
    run = make_run(tmp_path / "outside")
    run.metrics.write_text(json.dumps({**LINE, "loss": 0.777}) + "\n")
    run.console.write_text(SECRET)
    run.rank_log(0).write_text(SECRET)
    return run.path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs/given")


def lead_out(run: RunDir, outside: Path, name: str) -> Path:
    """Make `name` in the run a link to the same name outside."""
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / name)
    (outside / name).touch()
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(monkeypatch: pytest.MonkeyPatch, verb: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"shardway {verb}", *map(str, words)])
    {"logs": logs, "report": report, "runs": runs}[verb].main()


@pytest.mark.parametrize(
    ("name", "words"),
    [("logs/attempt-1/console.log", ()), ("logs/attempt-1/rank-00.log", ("--rank", "0")),
     ("logs", ()), ("logs/attempt-1", ("--rank", "0")), ("logs/slurm-7.out", ()),
     ("logs/attempt-1/console.log", ("--follow",)), ("logs/attempt-1/job.json", ("--attempt", 1))],
)  # fmt: skip
def test_logs_prints_no_file_outside(
    run: RunDir, outside: Path, name: str, words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    link = lead_out(run, outside, name)
    with pytest.raises(LeadsOut, match=f"{link} is a link that leads out of {run.path}, to "):
        call(monkeypatch, "logs", run.path, *words)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_leads_out_is_in_the_table_and_hides_no_other(
    run: RunDir, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_run(run.path.parent / "other")
    lead_out(run, outside, name)
    call(monkeypatch, "runs", run.path.parent)
    _, *lines = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert len(lines) == 2
    assert "0.7770" not in "".join(lines)
    given, other = sorted(lines)
    assert "finished" in other
    assert "leads out" not in other
    if "process" not in name:  # nobody asks who runs a finished run
        assert "leads out of the run folder" in given


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "logs"])
def test_a_report_shows_the_other_runs_and_says_what_leads_out(
    run: RunDir, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_run(run.path.parent / "other")
    lead_out(run, outside, name)
    page = run.path.parent / "report.html"
    call(monkeypatch, "report", run.path, other.path, "--output", page)
    text = page.read_text()
    assert f"{run.path / name} is a link that leads out of {run.path}" in text
    assert "0.777" not in text
    assert "2.0000" in text
    if name == "metrics.jsonl":
        with pytest.raises(UserError, match=r"metrics\.jsonl is a link that leads out"):
            call(monkeypatch, "report", run.path)


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "logs", "logs/attempt-1", "logs/attempt-1/status.json", "logs/.lock",
     "logs/attempt-1/rank-00.process.json", "logs/starting", "launch.json"],
)  # fmt: skip
def test_resume_changes_nothing_outside(
    run: RunDir, outside: Path, adapter: Path, tiny: Path, name: str
) -> None:
    save(run, 1, adapter, tiny)
    if "process" in name:
        run.status.unlink()
    lead_out(run, outside, name)
    before = contents(outside)
    with pytest.raises(UserError, match=r"is a link that leads out of .*/given, to .*/outside/"):
        control.resume_run(run.path)
    assert contents(outside) == before


def test_a_request_to_stop_is_not_written_elsewhere(run: RunDir, outside: Path) -> None:
    run.status.unlink()
    lead_out(run, outside, "stop").unlink()
    (run.path / "stop").symlink_to(outside / "config.yaml")
    before = contents(outside)
    with pytest.raises(UserError):
        list(control.request_stop(run.path))
    with pytest.raises(LeadsOut), run.lock():
        run.stop.unlink()
    assert contents(outside) == before


def save(run: RunDir, step: int, adapter: Path, base: Path) -> Checkpoint:
    """A checkpoint of an adapter."""
    checkpoint = Checkpoint(run.checkpoints / f"step-{step:06d}")
    shutil.copytree(adapter, checkpoint.path / "adapter")
    shutil.copyfile(run.config, checkpoint.config)
    content = {"step": step, "content": "all", "base": {"name_or_path": str(base)}}
    manifest.write(checkpoint.manifest, content)
    return checkpoint


@pytest.fixture
def trained(run: RunDir, adapter: Path, tiny: Path) -> RunDir:
    """A run with the checkpoints of steps 1 to 3."""
    for step in (1, 2, 3):
        save(run, step, adapter, tiny)
    return run


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "chat_template.jinja", "manifest.json", "adapter",
             "config.yaml", "deep/anything", ""],
)  # fmt: skip
def test_a_checkpoint_that_leads_out_is_named_and_not_used(
    trained: RunDir, tmp_path: Path, name: str
) -> None:
    newest = trained.checkpoints / "step-000003"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(newest, elsewhere)
    (elsewhere / "chat_template.jinja").write_text(SECRET)
    (newest / "deep").mkdir()
    path = newest / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(elsewhere / name)
    source = find_source(trained.path)
    assert source.path.name == "step-000002"
    assert f"{path} is a link that leads out of " in source.describe()
    assert find_target(trained.path).path.name == "step-000002"
    for door in (find_source, find_target, lambda path: named_checkpoint(str(path))):
        with pytest.raises(UserError, match=r"is a link that leads out of .*/elsewhere"):
            door(newest)
    if name.startswith("adapter/"):
        with pytest.raises(LeadsOut):
            find_adapter(str(newest), "method.adapter")
    if name == "adapter":
        for look in (find_source, lambda path: find_adapter(str(path), "method.adapter")):
            with pytest.raises(LeadsOut):
                look(path)


def test_links_that_users_make_are_followed(trained: RunDir, tmp_path: Path, tiny: Path) -> None:
    disk = tmp_path / "big disk"
    shutil.move(trained.checkpoints, disk)
    trained.checkpoints.symlink_to(disk)
    (disk / "step-000003/adapter/again.json").symlink_to("adapter_config.json")
    latest = trained.path.parent / "latest"
    latest.symlink_to(trained.path.name)
    assert f"which is in {disk}" in find_source(latest).describe()
    assert find_target(latest).path.name == "step-000003"
    (tmp_path / "best").symlink_to(disk / "step-000002")
    assert find_source(tmp_path / "best").path.name == "best"
    linked = tmp_path / "model"
    linked.mkdir()
    for file in tiny.iterdir():
        (linked / file.name).symlink_to(file)
    assert find_source(linked).base == linked
    assert find_target(linked).model == linked


def test_the_newest_whole_checkpoint_is_named_if_one_has_damaged_weights(trained: RunDir) -> None:
    for step in (3, 2):
        file = trained.checkpoints / f"step-{step:06d}/adapter/adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    said = r"adapter_model\.safetensors has changed .*; name .*/step-000001, which is whole"
    for door in (find_source, find_target):
        with pytest.raises(UserError, match=said):
            door(trained.path)
    shutil.rmtree(trained.checkpoints / "step-000001")
    with pytest.raises(UserError, match="no older checkpoint is whole"):
        find_source(trained.path)


def test_logs_names_the_attempts_there_are(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(run.path, 3).logs.mkdir()
    with pytest.raises(UserError, match=r"given has no attempt 9; its attempts: 1, 3$"):
        call(monkeypatch, "logs", run.path, "--attempt", 9)
    call(monkeypatch, "logs", run.path, "--attempt", 1)
    assert capsys.readouterr().out == "hello\n"
    (run.logs / "rank-x.log").touch()
    with pytest.raises(UserError, match="there are logs of ranks none yet"):
        call(monkeypatch, "logs", run.path, "--attempt", 1, "--rank", 0)


def test_runs_shows_one_run_and_says_where_it_looks(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.path)
    for word in (run.path, "."):
        call(monkeypatch, "runs", word)
        head, line = capsys.readouterr().out.splitlines()
        assert head.split()[:2] == ["run", "state"]
        assert line.split()[:2] == ["given", "finished"]
    with pytest.raises(UserError, match=r"runs contains no run .*; FOLDER is \./runs by default"):
        call(monkeypatch, "runs")
    with pytest.raises(UserError, match=r"logs contains no run \(a folder with a config.yaml\)$"):
        call(monkeypatch, "runs", "logs")
