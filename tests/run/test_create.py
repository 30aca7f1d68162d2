"""How the folder of a new run is created."""

from __future__ import annotations

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
