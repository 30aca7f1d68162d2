"""What a run in a terminal prints is kept in a file, which `shardway logs` prints."""

from __future__ import annotations

import os
import pty
import subprocess
import termios
from pathlib import Path

import pytest

from launcher.folders.run import RunDir
from launcher.run.rank_log import Console, ConsoleFile, Terminal
from tests.helpers.commands import SHARDWAY, SHORT, TRAIN_TINY, shardway

pytestmark = pytest.mark.slow


def run_in_terminal(*words: str, cwd: Path) -> str:
    """What `shardway …` writes to a terminal, until it ends."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    process = subprocess.Popen([*SHARDWAY, *words], cwd=cwd, stdout=theirs, stderr=theirs)
    os.close(theirs)
    pieces = []
    while True:
        try:
            pieces.append(os.read(ours, 1 << 16))
        except OSError:  # the last process has closed it
            break
    process.wait(60)
    os.close(ours)
    return b"".join(pieces).decode()


def test_a_terminal_gets_a_bar_and_the_file_plain_lines(tiny: Path, tmp_path: Path) -> None:
    words = ("data.eval_rows=5", "training.eval_steps=2", "run_dir=run")
    shown = run_in_terminal(
        *TRAIN_TINY, *SHORT, "training.stop_after_steps=2", *words, cwd=tmp_path
    )
    run = RunDir(tmp_path / "run")
    text = run.console.read_text()
    assert "2/2 [" in shown, "the bar"
    assert "2/2 [" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == f"run folder: {run.path}"
    assert "starting 2 ranks; importing torch comes first" in lines
    assert any(line.startswith("data: ") for line in lines)
    assert [line for line in lines if line.startswith("step 2: eval_loss ")]
    assert lines[-1] == (
        f"stopped after step 2 (training.stop_after_steps=2); resume: shardway resume {run.path}"
    )
    assert lines[-1] in shown

    resumed = shardway("resume", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    second = RunDir(run.path, 2).console.read_text()
    assert second == resumed.stdout, "without a terminal they are the same"
    said = "resume: from step-000002, if its files are whole\n  training.stop_after_steps: 2 → None"
    assert said in second
    assert "resumed from step-000002: 2 steps" in second
    assert "step 4/4  loss " in second
    assert shardway("logs", "run", cwd=tmp_path).stdout == second
    assert shardway("logs", "run", "--attempt", "1", cwd=tmp_path).stdout == text
    assert shardway("logs", "run", "--follow", cwd=tmp_path).stdout == second
    rank = RunDir(run.path, 2).rank_log(1).read_text()
    assert shardway("logs", "run", "--rank", "1", cwd=tmp_path).stdout == rank

    again = shardway("resume", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"nothing to do: {run.path} has finished with step 4; to train")
    assert run.newest_attempt().attempt == 2


@pytest.mark.parametrize("path", ["/dev/full", "gone/console.log"])
def test_a_full_disk_or_a_folder_that_has_gone_ends_nothing(path: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    console = Console(Terminal(write), ConsoleFile(tmp_path / path))
    print("still here", file=console, flush=True)
    assert os.read(read, 100) == b"still here\n"
    os.close(read)
    print("nobody reads", file=console, flush=True)
    os.close(write)


def test_a_file_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    console = ConsoleFile(tmp_path / "console.log")
    console.write("one\n")
    (tmp_path / "console.log").unlink()
    console.write("two\n")
    assert (tmp_path / "console.log").read_text() == "two\n"
