"""`shardway schedule` draws the configured learning rates, and overwrites nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.commands import schedule
from launcher.config.schema.scheduler import SCHEDULERS
from tests.helpers.commands import in_process

FIVE = ["--steps", "5"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    return in_process(monkeypatch, "schedule", *words)


def test_the_curve_is_drawn_in_plain_characters() -> None:
    assert schedule.format_chart("linear", [0.0, 2.0, 1.5, 1.0, 0.5]).splitlines() == [
        "linear",
        " 2.00e+00 | *",
        *["          |"] * 2,
        "          |  *",
        "          |",
        "          |   *",
        *["          |"] * 2,
        "          |    *",
        *["          |"] * 2,
        " 0.00e+00 |*",
        "          +-----",
        "     step  1   5",
        "rate 0 in step 1, 2 at most (step 2), 0.5 in step 5",
    ]


def test_a_curve_of_one_step_is_drawn() -> None:
    assert "     step  1\n" in schedule.format_chart("constant", [1.0])


def test_every_curve_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    names = [name for name in SCHEDULERS if name != "reduce_lr_on_plateau"]
    words = ("training.max_steps=20", "--multirun", f"scheduler={','.join(names)}")
    assert typed(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert [part.split("\n")[0] for part in said.split("\n\n")][:-1] == names
    assert said.endswith("\n\npicture: schedule.png\n")
    assert (here / "schedule.png").stat().st_size > 1000


def test_a_plateau_is_drawn_as_if_the_loss_never_fell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = ("scheduler=reduce_lr_on_plateau", "scheduler.patience=0", "scheduler.factor=0.5")
    watched = ("training.eval_steps=2", "data.eval_rows=2")
    assert typed(monkeypatch, "--steps", "7", "--no-picture", *words, *watched) == 0
    said = capsys.readouterr().out
    assert "0.0001 in step 1, 0.0001 at most (step 1), 2.5e-05 in step 7\n" in said
    assert "never fell" in said
    assert list(here.iterdir()) == []


def test_several_curves_are_drawn_in_one_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    (here / "schedule.png").write_text("mine")
    assert typed(monkeypatch, *FIVE, "--multirun", "scheduler.warmup_ratio=0,0.2") == 0
    said = capsys.readouterr().out
    assert "cosine\n" in said
    assert "cosine warmup_ratio=0.2\n" in said
    assert "picture: schedule-2.png" in said
    assert sorted(path.name for path in here.iterdir()) == ["schedule-2.png", "schedule.png"]
    assert (here / "schedule.png").read_text() == "mine"


def test_a_named_picture_is_overwritten_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    (here / "mine.png").write_text("mine")
    assert typed(monkeypatch, *FIVE, "--output", "mine.png") == 2
    assert capsys.readouterr() == ("", "mine.png exists → another --output, or --overwrite\n")
    assert (here / "mine.png").read_text() == "mine"
    assert typed(monkeypatch, *FIVE, "--output", "mine.png", "--overwrite") == 0
    assert (here / "mine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["scheduler=linear"], "is unknown without the data → --steps 500"),
        (["--steps", "0"], "--steps 0 is not a number of steps"),
        ([*FIVE, "scheduler.warmup_steps=9"], "scheduler.warmup_steps=0 [warmup-ends]"),
        ([*FIVE, "scheduler=constant", "scheduler.warmup_steps=9"], "and not of the selected"),
        ([*FIVE, "experiment=demo", "scheduler=constant"], "(~scheduler.warmup_steps if"),
        ([*FIVE, "scheduler=reduce_lr_on_plateau"], "[plateau-needs-evaluation]"),
        ([*FIVE, "--output", "not/there.png"], "does not exist → create it, or choose another"),
        ([*FIVE, "--output", "x.foo"], "--output x.foo is not a picture → a name in .png"),
    ],
)
def test_an_undrawable_schedule_is_reported_with_the_reason(
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    here: Path,
) -> None:
    assert typed(monkeypatch, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not list(here.iterdir())


def test_a_setting_from_a_file_can_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the error message in the test above advises."""
    words = ["experiment=demo", "scheduler=constant", "~scheduler.warmup_steps"]
    assert typed(monkeypatch, "--no-picture", *FIVE, *words) == 0


def test_a_curve_is_drawn_without_torch() -> None:
    code = (
        "import sys; from launcher.commands import schedule; "
        "sys.argv = ['schedule', '--steps', '5', 'scheduler=linear']; schedule.main(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
