"""When the evaluation loss counts as stalled, and what is the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.checkpoint.resume import differences
from launcher.config import store
from launcher.watch import Watch
from tests.config.test_schema import composed

NAN = float("nan")


def stalled_after(losses: list[float], patience: int | None, threshold: float = 0.0) -> int | None:
    """The number of the evaluation after which training ends; the watch is saved and brought back
    after each."""
    watch = Watch(patience, threshold)
    for number, loss in enumerate(losses, start=1):
        state = json.loads(json.dumps(watch.state(), allow_nan=False))
        watch = Watch(patience, threshold)
        watch.go_on_from(state)
        watch.add(10 * number, loss)
        if watch.stalled():
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "after"),
    [
        ([2.0, 1.0, 1.1, 1.0, 0.9], None, 0.0, None),
        ([2.0, 1.0, 1.1, 1.0, 0.9], 2, 0.0, 4),
        ([2.0, 1.0, 1.1, 0.9, 0.8], 2, 0.0, None),
        ([2.0, 1.95, 1.85, 1.84], 2, 0.1, None),
        ([2.0, 1.95, 1.91, 1.0], 2, 0.1, 3),
        ([2.0, 2.0], 1, 0.0, 2),
        ([NAN, NAN, 1.0], 2, 0.0, 2),
        ([2.0, NAN, 1.0, NAN, 1.5], 2, 0.0, 5),
    ],
)
def test_training_stalls_after_so_many_evaluations_without_improvement(
    losses: list[float], patience: int | None, threshold: float, after: int | None
) -> None:
    assert stalled_after(losses, patience, threshold) == after


def test_the_best_is_the_lowest_however_little_lower() -> None:
    watch = Watch(patience=2, threshold=0.5)
    for step, loss in ((10, 2.0), (20, 1.9), (30, 1.95)):
        watch.add(step, loss)
    assert [watch.is_lowest(step) for step in (10, 20, 30)] == [False, True, False]
    assert watch.has_seen(30)
    assert not watch.has_seen(31)
    assert watch.reason() == (
        "training.early_stopping_patience=2: eval_loss has not improved in 2 evaluation(s); "
        "the lowest is 1.9000, after step 20"
    )


def test_without_a_finite_loss_the_reason_says_so() -> None:
    watch = Watch(patience=1)
    assert watch.reason() is None
    watch.add(10, NAN)
    assert str(watch.reason()).endswith("none is finite")


@pytest.mark.parametrize(("scheduler", "free"), [("cosine", True), ("reduce_lr_on_plateau", False)])
def test_evaluations_may_change_unless_the_learning_rate_goes_by_them(
    scheduler: str, free: bool, tmp_path: Path
) -> None:
    before = composed(scheduler={"name": scheduler}, training={"eval_steps": 5})
    (tmp_path / "config.yaml").write_text(store.dump(store.build(before)))
    now = composed(
        scheduler={"name": scheduler}, training={"eval_steps": 6, "early_stopping_patience": 3}
    )
    found = differences(tmp_path / "config.yaml", store.build(now))
    patience = "training.early_stopping_patience: None → 3"
    assert patience in found.free
    assert ("training.eval_steps: 5 → 6" in found.free) is free
    assert found.breaking == ([] if free else ["training.eval_steps: 5 → 6"])
