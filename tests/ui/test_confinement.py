"""No answer of the page contains a file outside its roots, whatever links to it, and no pipe holds
the page up."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest

from launcher.config import Config
from launcher.config.compose import compose
from launcher.errors import UserError
from launcher.folders import manifest, paths
from launcher.folders.run import RunDir
from launcher.run import create
from launcher.ui import chat_models, experiment, form
from launcher.ui.context import PageContext
from launcher.ui.i18n import ENGLISH
from launcher.ui.roots import MAX_RECORD_BYTES, Roots
from launcher.ui.tabs.export import ExportTab

SECRET = "the-secret-of-another-folder"
# What the secret file contains, so that each reader would take it for its own.
CONTENT = {
    ".jsonl": json.dumps({"step": 1, "loss": 1.0, "learning_rate": 1.0, "time": 1.0, "x": SECRET}),
    ".json": json.dumps({"state": SECRET, "job": SECRET, "base": {"name_or_path": SECRET}}),
    ".yaml": f"{SECRET}: {SECRET}\n",
}
IN_RUN = (
    "config.yaml",
    "launch.json",
    "slurm.json",
    "stop",
    "metrics.jsonl",
    "logs",
    "logs/attempt-1",
    "logs/attempt-1/status.json",
    "logs/attempt-1/steps.json",
    "logs/attempt-1/job.json",
    "logs/attempt-1/rank-00.log",
    "logs/attempt-1/rank-00.error.json",
    "logs/attempt-1/console.log",
    "logs/attempt-1/zz.log",
    "logs/slurm-7.out",
    "checkpoints",
    "checkpoints/step-000001",
    "checkpoints/step-000001/manifest.json",
    "checkpoints/step-000001/adapter/adapter_config.json",
)
ELSEWHERE = (
    "runs/.page/a.json",
    "runs/.page/a.log",
    "runs/.page/export of a.out",
    "runs/.page/export of a.log",
    "experiments/experiment/mine.yaml",
    "model/config.json",
    "model/chat_template.jinja",
    "model/tokenizer_config.json",
    "model/deep/more.json",
)
FILES = (*(f"runs/a/{name}" for name in IN_RUN), *ELSEWHERE)


@pytest.fixture(scope="module")
def config(tiny: Path) -> Config:
    return compose(["model=tiny", "run_dir=runs/a"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> PageContext:
    """One page for all tests: its first look at this machine's processes takes a second."""
    return PageContext(Roots.of([tmp_path_factory.mktemp("home")]))


@pytest.fixture
def context(
    page: PageContext, tiny: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> PageContext:
    home = page.roots.home
    monkeypatch.chdir(home)
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(tiny, home / "model", symlinks=False)
    (home / "model/deep").mkdir()
    run, _ = create.start_attempt(config, ["shardway"], 1)
    run.metrics.write_text(CONTENT[".jsonl"].replace(SECRET, "fine") + "\n")
    run.rank_log(0).write_text("a line\n")
    adapter = run.checkpoints / "step-000001/adapter"
    adapter.mkdir(parents=True)
    settings = {"base_model_name_or_path": str(home / "model"), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copyfile(run.config, adapter.parent / "config.yaml")
    content = {"step": 1, "content": "weights", "base": {"name_or_path": str(home / "model")}}
    manifest.write(adapter.parent / "manifest.json", content)
    (home / "experiments/experiment").mkdir(parents=True)
    (home / "experiments/experiment/mine.yaml").write_text("training:\n  seed: 7\n")
    (home / "runs/.page").mkdir()
    return page


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a secret under every name."""
    folder = tmp_path / "outside"
    (folder / "attempt-1").mkdir(parents=True)
    for name in ("secret", *(Path(name).name for name in FILES)):
        for place in (folder, folder / "attempt-1"):
            if (place / name).is_dir():
                continue
            text = CONTENT.get(Path(name).suffix, f"{SECRET}\n")
            (place / name).write_text(text)
    return folder


def replace(target: Path, make: Callable[[Path], object]) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    make(target)


def answers(context: PageContext, tab: ExportTab, name: str) -> Iterator[str]:
    """Everything that the page answers; its messages are answers, too.

    Commands that do not read the file `name` are not started: that takes seconds.
    """
    viewer, roots = context.viewer, context.roots
    for run in [*viewer.names(), "a"]:
        yield viewer.view(run, ENGLISH).html
        metrics = viewer.view(run, ENGLISH).metrics
        yield repr(vars(metrics)) if metrics else ""
        for label in [*viewer.logs(run), "console", "rank 0"]:
            yield viewer.log(run, label)
    asked: list[Callable[[], object]] = [
        lambda: viewer.compare(["a"]),
        lambda: viewer.run("a").path,
        lambda: chat_models.chat_choices(roots),
        lambda: chat_models.export_choices(roots),
        lambda: context.jobs.job("a").is_running,
        lambda: context.jobs.job("a").log_tail(),
        lambda: tab._update("export of a"),
        lambda: tab._arguments("model", "", "new", "5GB", "auto", "cpu", False),
        lambda: tab._arguments("runs/a", "", "other", "5GB", "auto", "cpu", False),
    ]
    if name.startswith("model"):
        values = form.initial_values() | {"model.name_or_path": "model"}
        asked.append(lambda: form.check_form(values, "", roots).problems)
        asked.append(lambda: context.models.load("A", "model", ""))
    if name.startswith("runs/a/checkpoints"):
        asked.append(lambda: context.models.load("A", "runs/a", ""))
    if name.startswith("experiments"):
        asked.append(lambda: experiment.load(roots, "mine"))
    if name.startswith("runs/.page"):
        asked.append(lambda: context.jobs.start("a", ["--help"]).name)
    for ask in asked:
        try:
            yield str(ask())
        except UserError as error:
            yield str(error)
    context.models.close()


@pytest.fixture(scope="module")
def tab(page: PageContext) -> ExportTab:
    with gr.Blocks():
        return ExportTab(page, ENGLISH)


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_the_outside_is_shown_nowhere(
    name: str, context: PageContext, tab: ExportTab, outside: Path
) -> None:
    source = outside if Path(name).suffix in ("", ".page") else outside / Path(name).name
    if name.endswith("stop"):
        source = outside / "stop"
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    replace(context.roots.home / name, lambda target: target.symlink_to(source))
    for answer in answers(context, tab, name):
        assert SECRET not in answer
    after = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    assert before == after, "and nothing is written through it"


@pytest.mark.parametrize("name", [name for name in FILES if Path(name).suffix])
def test_a_pipe_does_not_hold_the_page_up(name: str, context: PageContext, tab: ExportTab) -> None:
    replace(context.roots.home / name, os.mkfifo)
    thread = threading.Thread(target=lambda: list(answers(context, tab, name)), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_a_folder_with_a_link_to_the_outside_is_not_exported_and_not_loaded(
    context: PageContext, tab: ExportTab, outside: Path
) -> None:
    (context.roots.home / "model/deep/more.jinja").symlink_to(outside / "secret")
    for ask in (
        lambda: tab._arguments("model", "", "new", "5GB", "auto", "cpu", False),
        lambda: tab._arguments("runs/a", "", "new", "5GB", "auto", "cpu", False),
        lambda: context.models.load("A", "model", ""),
    ):
        with pytest.raises(UserError, match=r"model/deep/more.jinja is outside"):
            ask()


def test_rows_outside_are_not_evaluated(
    context: PageContext, tab: ExportTab, outside: Path
) -> None:
    words = "model", "", "new", "5GB", "auto", "cpu", False
    with pytest.raises(UserError, match="secret is outside"):
        tab._arguments(*words, str(outside / "secret"))
    (context.roots.home / "rows.jsonl").touch()
    arguments, _ = tab._arguments(*words, " rows.jsonl ")
    assert arguments[-2:] == ["--evaluate", str(context.roots.home / "rows.jsonl")]


def test_snapshots_of_the_hub_are_links_within_one_folder_and_are_read(
    context: PageContext, tab: ExportTab, tiny: Path
) -> None:
    hub = context.roots.home / "hub/models--a--b"
    (hub / "snapshots/1").mkdir(parents=True)
    shutil.copytree(tiny, hub / "blobs")
    for file in (hub / "blobs").iterdir():
        (hub / "snapshots/1" / file.name).symlink_to(Path("../../blobs") / file.name)
    arguments, _ = tab._arguments(
        "hub/models--a--b/snapshots/1", "", "new", "5GB", "auto", "cpu", False
    )
    assert str(hub / "snapshots/1") in arguments


def test_a_huge_settings_file_is_named_instead_of_read(context: PageContext) -> None:
    run = RunDir(context.roots.home / "runs/a")
    os.truncate(run.config, MAX_RECORD_BYTES * 1000)
    assert "config.yaml has 16,000 MB" in context.viewer.view("a", ENGLISH).html


def test_a_link_that_is_put_there_while_a_file_is_opened_is_refused(
    context: PageContext, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = context.roots.home / "notes.txt"
    file.write_text("fine")
    really_open = os.open

    def swap(path: Path, *arguments: int) -> int:
        if Path(path) == file:
            file.unlink(missing_ok=True)
            file.symlink_to(outside / "secret")
        return really_open(path, *arguments)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises((OSError, UserError)):
        context.roots.open(file)


def test_links_in_the_cache_are_trusted(context: PageContext, cache: Path, outside: Path) -> None:
    (cache / "linked").mkdir(exist_ok=True)
    link = cache / "linked/file"
    link.unlink(missing_ok=True)
    link.symlink_to(outside / "secret")
    assert context.roots.check_tree(paths.cache() / "linked")
    with context.roots.open(link) as file:
        assert SECRET in file.read().decode()
