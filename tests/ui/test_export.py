"""The Export tab shows each progress line that `shardway consolidate` prints."""

from __future__ import annotations

import pytest

from launcher.export.writing.progress import Progress
from launcher.ui.i18n import ENGLISH
from launcher.ui.tabs.export import format_progress


@pytest.mark.parametrize(
    ("description", "unit", "shown"),
    [
        ("writing", "B", "writing 0.50 / 2.00 GB, "),
        ("reading back", "B", "reading back 0.50 / 2.00 GB, "),
        ("evaluating my model", "tokens", "evaluating my model 500,000,000 / 2,000,000,000 tokens"),
    ],
)
def test_a_progress_line_is_a_bar(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    description: str,
    unit: str,
    shown: str,
) -> None:
    monkeypatch.setattr(Progress, "every_seconds", 0.0)
    with Progress(description, 2 * 10**9, unit) as progress:
        progress.advance(10**8)
        progress.advance(4 * 10**8)
        printed = capsys.readouterr().err
    bar = format_progress(printed, ENGLISH)
    assert shown in bar
    assert "width:25.0%" in bar
