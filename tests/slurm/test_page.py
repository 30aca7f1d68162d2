"""The page before a real Slurm: what its buttons call, without the browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.ui import form
from launcher.ui.places import Places
from launcher.ui.processes import Processes
from launcher.ui.viewer import Viewer
from launcher.ui.words import ENGLISH
from tests.helpers.slurm import Slurm


def test_a_job_of_the_page_is_queued_shown_and_done(
    slurm: Slurm, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    places = Places.of([tmp_path])
    processes = Processes(places)
    viewer = Viewer(places, processes)
    values = form.begun({"model": "tiny", "cluster": "slurm"})
    values |= {"training.epochs": "", "training.max_steps": "40", "cluster.nodes": "2"}
    found = form.look(values, "", places)
    assert not found.problems
    assert found.world
    assert (found.world.size, found.world.nodes) == (2, 2)
    job = processes.start("queued", ["train", *found.overrides, "run_dir=runs/queued"])
    slurm.until(lambda: not job.lives, 60)
    assert "is in the queue" in job.said()
    seen = set()

    def over() -> bool:
        shown = viewer.show("queued", ENGLISH)
        seen.add((shown.state, shown.lives))
        return shown.state in ("finished", "failed")

    slurm.until(over, 180)
    assert seen >= {("finished", False)}, viewer.log("queued", "slurm")
    assert all(lives for state, lives in seen if state not in ("finished", "failed"))
    assert {"running", "pending"} & {state for state, _ in seen}
    assert "step 40 / 40" in viewer.show("queued", ENGLISH).html
    assert "rank 1" in viewer.logs("queued")
    assert "step 40/40" in viewer.log("queued", "slurm")
