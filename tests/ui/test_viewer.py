"""How the page shows runs; the tests write the run folders in the format of a real run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest

from launcher.config.compose import compose
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run import create
from launcher.ui import override_syntax, run_html
from launcher.ui.i18n import ENGLISH
from launcher.ui.jobs import Jobs, tail
from launcher.ui.roots import Roots
from launcher.ui.viewer import Viewer


@pytest.fixture
def roots(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    monkeypatch.chdir(tmp_path)
    return Roots.of([tmp_path])


@pytest.fixture
def view(roots: Roots) -> Viewer:
    return Viewer(roots, Jobs(roots))


def make(name: str, *overrides: str) -> RunDir:
    config = compose(
        ["model=tiny", f"run_dir={override_syntax.format_value(f'runs/{name}')}", *overrides]
    )
    run, _ = create.start_attempt(config, ["shardway"], 1)
    run.starter.unlink()  # this process is no launcher
    return run


def write(run: RunDir, *steps: int, **more: float) -> None:
    with run.metrics.open("a") as file:
        for step in steps:
            record = {"step": step, "loss": 9.0 / step, "learning_rate": 0.1, "time": float(step)}
            file.write(json.dumps({**record, "tokens_per_second": 5.0, **more}) + "\n")


def test_without_runs_the_list_is_empty(view: Viewer) -> None:
    assert view.names() == []


def test_a_finished_run_is_shown(view: Viewer) -> None:
    run = make("a", "training.epochs=null", "training.max_steps=4")
    write(run, 1, 2, 3, 4)
    run.status.write_text(json.dumps({"state": "finished"}))
    shown = view.view("a", ENGLISH)
    assert shown.metrics is not None
    assert (shown.state, shown.metrics.count) == ("finished", 4)
    assert "step 4 / 4" in shown.html
    assert "time left" not in shown.html
    assert run_html.charts(shown.metrics).count("<svg") == 3


def test_the_total_steps_of_epochs_are_shown_once_the_ranks_report_them(view: Viewer) -> None:
    run = make("a", "training.epochs=2")
    write(run, 1)
    assert "step 1 /" not in view.view("a", ENGLISH).html
    run.steps.write_text(json.dumps({"total_steps": 40}))
    assert "step 1 / 40" in view.view("a", ENGLISH).html


def test_an_attempt_without_ranks_or_status_failed(view: Viewer) -> None:
    make("a")
    assert view.view("a", ENGLISH).state == "failed"


def test_names_are_escaped(view: Viewer) -> None:
    run = make("a", "model.name='<script>alert(1)</script>'")
    write(run, 1)
    page = view.view("a", ENGLISH).html
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_logs_are_shown_by_rank(view: Viewer) -> None:
    run = make("a")
    run.rank_log(0).write_text("nought\n")
    run.rank_log(11).write_text("eleven\n")
    assert list(view.logs("a")) == ["rank 0", "rank 11"]
    assert view.log("a", "rank 11") == "eleven\n"
    assert view.log("a", "../../etc/passwd") == "nought\n"


def test_only_the_last_state_of_a_progress_bar_is_shown(view: Viewer) -> None:
    run = make("a")
    run.rank_log(0).write_text("10%\r20%\r30%\ndone\n")
    assert view.log("a", "rank 0") == "30%\ndone\n"


def test_a_long_log_is_cut_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(100_000)))
    text = tail(Roots.of([tmp_path]), path)
    assert text.startswith("line ")
    assert text.endswith("line 99999\n")
    assert len(text) <= 1 << 16


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "{}"),
        ("metrics.jsonl", '{"step": 1, "loss": null, "learning_rate": 0.1}\nnonsense\n'),
        ("metrics.jsonl", '{"step": "1", "loss": 1.0}\n'),
        ("logs/attempt-1/status.json", ""),
        ("logs/attempt-1/status.json", '{"state": ""}'),
        ("logs/attempt-1/steps.json", "{}"),
        ("slurm.json", "{}"),
    ],
)
def test_an_invalid_run_folder_does_not_hide_the_others(
    view: Viewer, file: str, content: str
) -> None:
    write(make("good"), 1)
    (make("odd").path / file).write_text(content)
    assert set(view.names()) == {"good", "odd"}
    assert view.view("good", ENGLISH).metrics is not None
    assert "error" not in view.view("good", ENGLISH).html
    assert "error" in view.view("odd", ENGLISH).html


def test_what_a_damaged_run_still_says_is_shown(view: Viewer) -> None:
    run = make("odd", "training.epochs=null", "training.max_steps=4")
    write(run, 1, 2)
    run.config.write_text("model: [")
    run.status.write_text("{")
    run.steps.write_text(json.dumps({"total_steps": 4}))
    shown = view.view("odd", ENGLISH)
    assert (shown.state, shown.can_stop) == ("damaged", False)
    assert "step 2 / 4" in shown.html
    assert "4.5000" in shown.html
    assert "config.yaml is not a frozen configuration" in shown.html
    assert "status.json cannot be read" in shown.html


def test_of_many_long_runs_only_samples_are_kept(view: Viewer) -> None:
    """All have the lines of one, so that the test needs no gigabytes."""
    first = make("r0")
    write(first, *range(1, 15_001))
    for number in range(1, 4):
        shutil.copytree(first.path, first.path.with_name(f"r{number}"), copy_function=os.link)
    view.charts(view.view("r0", ENGLISH))  # imports
    tracemalloc.start()
    shown = [view.view(name, ENGLISH).metrics for name in view.names()]
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(metrics is not None and metrics.count == 15_000 for metrics in shown)
    assert kept < 4 * 1_000_000, "so twenty runs keep less than 20 MB"


def test_unusual_run_names_and_log_backups_are_accepted(view: Viewer) -> None:
    run = make("my run é")
    (run.path / "logs/attempt-1.bak").mkdir()
    assert view.names() == ["my run é"]
    assert view.view("my run é", ENGLISH).state == "failed"


def test_a_run_that_is_a_link_to_the_outside_is_ignored(
    view: Viewer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make("a")
    outside = tmp_path_factory.mktemp("outside") / "a"
    run.path.rename(outside)
    run.path.symlink_to(outside)
    assert view.names() == []


def test_a_slow_queue_is_not_waited_for(
    view: Viewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown state does not count as the end of the run."""
    (tmp_path / "squeue").write_text("#!/bin/sh\nsleep 30\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = make("a")
    run.submitted.write_text(json.dumps({"job": "7"}))
    shown = view.view("a", ENGLISH)
    assert (shown.state, shown.can_stop) == ("unknown", True)


@pytest.mark.parametrize("name", ["../x", "nothing", "/etc", "a\0"])
def test_an_invalid_run_name_is_refused(view: Viewer, name: str) -> None:
    with pytest.raises(UserError, match="is not"):
        view.run(name)


def test_a_comparison_shows_only_the_settings_that_differ(
    view: Viewer,
) -> None:
    for name, rate in (("a", "0.25"), ("b", "0.125")):
        write(make(name, f"optimizer.learning_rate={rate}"), 1, 2)
    settings = view.compare(["a", "b"]).partition("Settings that differ")[2]
    cells = re.findall("<t[hd]>(.*?)</t[hd]>", settings)
    assert cells == ["setting", "a", "b", "optimizer.learning_rate", "0.25", "0.125"]


def test_a_process_outlives_the_server_and_is_found_again(roots: Roots) -> None:
    """It has its own session, and another server finds it through its record file."""
    sleep = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(600)"
    command = (sys.executable, "-c", sleep)
    job = Jobs(roots, command).start("sweep/0", ["train", "x=1"])
    again = Jobs(roots).job("sweep/0")
    try:
        assert again.is_running
        pid = json.loads(again.record.read_text())["pid"]
        assert os.getsid(pid) == pid
        with pytest.raises(UserError, match="is still running"):
            Jobs(roots).start("sweep/0", [])
        end = time.monotonic() + 300
        while "x=1" not in again.log_tail():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        job.stop()
    psutil.Process(pid).wait(30)
    assert not again.is_running


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pid": "1", "created": 1.0}'])
def test_a_job_with_a_damaged_record_is_not_running(roots: Roots, content: str) -> None:
    job = Jobs(roots).job("a")
    job.folder.mkdir(parents=True)
    job.record.write_text(content)
    assert not job.is_running
    job.stop()


def test_another_process_with_the_same_pid_is_not_running_as_this_job(roots: Roots) -> None:
    job = Jobs(roots).job("a")
    job.folder.mkdir(parents=True)
    job.record.write_text(json.dumps({"words": [], "pid": os.getpid(), "created": 1.0}))
    assert not job.is_running
