"""`shardway logs --follow`, with a run that ends, goes on in another attempt, or vanishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.commands import logs
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run import processes
from launcher.run.outcome import Outcome, write_status
from tests.helpers.commands import in_process


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """An attempt that this process seems to run."""
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(logs, "READ_SECONDS", 0.01)
    return attempt(RunDir(tmp_path / "run"), 1)


def attempt(run: RunDir, number: int) -> RunDir:
    new = RunDir(run.path, number)
    new.logs.mkdir(parents=True)
    run.config.touch()
    processes.write_record(new.starter)
    return new


def console(run: RunDir) -> Path:
    """Its console, which appears when somebody has looked for it in vain."""
    if run.console.is_file():
        return run.console
    run.console.write_text(f"first of {run.attempt}\n")
    raise UserError("nothing yet")


def add(run: RunDir) -> None:
    with run.console.open("a") as file:
        file.write(f"more of {run.attempt}\n")


@pytest.mark.parametrize("newest", [True, False])
def test_a_later_attempt_is_followed_unless_one_is_named(run: RunDir, newest: bool) -> None:
    texts = logs.follow(run, console, newest)
    assert next(texts) == "first of 1\n", "it had printed nothing"
    add(run)
    assert next(texts) == "more of 1\n"
    second = attempt(run, 2)
    if newest:
        assert next(texts) == "first of 2\n"
        add(second)
    add(run)  # a rank of the first attempt still writes
    write_status(second, Outcome(4, None))
    assert "".join(texts) == ("more of 2\n" if newest else "more of 1\n")


def test_a_run_that_vanishes_or_ends_without_a_word_is_named(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = logs.follow(run, console, True)
    assert next(texts) == "first of 1\n"
    shutil.rmtree(run.path)
    with pytest.raises(UserError, match=f"{run.path} has been removed"):
        next(texts)
    write_status(attempt(run, 1), Outcome(4, None))
    assert in_process(monkeypatch, "logs", str(run.path), "--follow") == 2
    assert capsys.readouterr().err == f"{run.path} has printed nothing yet\n"


def test_an_empty_log_is_named(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.rank_log(1).touch()
    run.console.write_text("a line\n")
    write_status(run, Outcome(4, None))
    for words in ((), ("--follow",)):
        assert in_process(monkeypatch, "logs", str(run.path), "--rank", "1", *words) == 0
        assert capsys.readouterr() == ("", f"{run.rank_log(1)} is empty\n")
        assert in_process(monkeypatch, "logs", str(run.path), *words) == 0
        assert capsys.readouterr() == ("a line\n", "")
