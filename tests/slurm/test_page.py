"""The page with a real Slurm: the functions behind its buttons, without the browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.ui import form
from launcher.ui.i18n import ENGLISH
from launcher.ui.jobs import Jobs
from launcher.ui.roots import Roots
from launcher.ui.viewer import Viewer
from tests.helpers.slurm import Slurm


def test_a_job_from_the_page_is_queued_shown_and_finished(
    slurm: Slurm, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    roots = Roots.of([tmp_path])
    jobs = Jobs(roots)
    viewer = Viewer(roots, jobs)
    values = form.initial_values({"model": "tiny", "cluster": "slurm"})
    values |= {"training.epochs": "", "training.max_steps": "40", "cluster.nodes": "2"}
    found = form.check_form(values, "", roots)
    assert not found.problems
    assert found.world
    assert (found.world.size, found.world.nodes) == (2, 2)
    job = jobs.start("queued", ["train", *found.overrides, "run_dir=runs/queued"])
    slurm.until(lambda: not job.is_running, 60)
    assert "is in the queue" in job.log_tail()
    seen = set()

    def over() -> bool:
        shown = viewer.view("queued", ENGLISH)
        seen.add((shown.state, shown.can_stop))
        return shown.state in ("finished", "failed")

    slurm.until(over, 180)
    assert seen >= {("finished", False)}, viewer.log("queued", "slurm")
    assert all(lives for state, lives in seen if state not in ("finished", "failed"))
    assert {"running", "pending"} & {state for state, _ in seen}
    assert "step 40 / 40" in viewer.view("queued", ENGLISH).html
    assert "rank 1" in viewer.logs("queued")
    assert "step 40/40" in viewer.log("queued", "slurm")
