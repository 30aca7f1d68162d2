"""How the folder of a new run is created."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from launcher.config import store
from launcher.errors import UserError
from launcher.run import create
from tests.helpers.compose import composed_raw


def test_unnamed_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = store.build(composed_raw())
    made = [create.start_attempt(config, ["x"], 1)[0].path for _ in range(3)]
    assert len(set(made)) == 3
    assert {path.parent for path in made} == {tmp_path / "runs"}
    named = store.build({**composed_raw(), "run_dir": str(made[0])})
    with pytest.raises(UserError, match="cannot be created: File exists"):
        create.start_attempt(named, ["x"], 1)


def test_the_date_of_the_launch_is_frozen_and_a_later_attempt_keeps_it(tmp_path: Path) -> None:
    raw = {**composed_raw(), "run_dir": str(tmp_path / "run")}
    run, frozen = create.start_attempt(store.build(raw), ["x"], 1)
    date.fromisoformat(frozen.data.template_date or "none")
    other = store.load(run.config)
    assert other.data.template_date == frozen.data.template_date
    text = run.config.read_text().replace(f"'{frozen.data.template_date}'", "'2024-07-26'")
    run.config.write_text(text)
    again = store.build({**raw, "resume": "auto"})
    run.starter.unlink()  # the attempt is over
    run, frozen = create.start_attempt(again, ["x"], 1)
    assert frozen.data.template_date == "2024-07-26"
    run.starter.unlink()
    run.config.write_text(text.replace("  template_date: '2024-07-26'\n", ""))  # of 0.1.0
    assert create.start_attempt(again, ["x"], 1)[1].data.template_date is None
