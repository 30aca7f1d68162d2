"""When the evaluation loss counts as stalled, and what is the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config import store
from launcher.run.resume import compare_configs
from launcher.training.early_stopping import EarlyStopping
from tests.helpers.compose import composed_raw

NAN = float("nan")


def stalled_after(losses: list[float], patience: int | None, threshold: float = 0.0) -> int | None:
    """The number of the evaluation after which training ends. The state is saved and restored after
    each."""
    early_stopping = EarlyStopping(patience, threshold)
    for number, loss in enumerate(losses, start=1):
        state = json.loads(json.dumps(early_stopping.state(), allow_nan=False))
        early_stopping = EarlyStopping(patience, threshold)
        early_stopping.load_state(state)
        early_stopping.add(10 * number, loss)
        if early_stopping.has_stalled():
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
def test_training_stalls_after_patience_evaluations_without_improvement(
    losses: list[float], patience: int | None, threshold: float, after: int | None
) -> None:
    assert stalled_after(losses, patience, threshold) == after


def test_the_lowest_loss_is_the_best_even_below_the_threshold() -> None:
    early_stopping = EarlyStopping(patience=2, threshold=0.5)
    for step, loss in ((10, 2.0), (20, 1.9), (30, 1.95)):
        early_stopping.add(step, loss)
    assert [early_stopping.is_lowest(step) for step in (10, 20, 30)] == [False, True, False]
    assert early_stopping.has_evaluated(30)
    assert not early_stopping.has_evaluated(31)
    assert early_stopping.reason() == (
        "training.early_stopping_patience=2: eval_loss has not improved in 2 evaluation(s); "
        "the lowest is 1.9000, after step 20"
    )


def test_the_reason_reports_that_no_loss_was_finite() -> None:
    early_stopping = EarlyStopping(patience=1)
    assert early_stopping.reason() is None
    early_stopping.add(10, NAN)
    assert str(early_stopping.reason()).endswith("none is finite")


@pytest.mark.parametrize(("scheduler", "free"), [("cosine", True), ("reduce_lr_on_plateau", False)])
def test_evaluations_may_change_unless_the_learning_rate_depends_on_them(
    scheduler: str, free: bool, tmp_path: Path
) -> None:
    before = composed_raw(scheduler={"name": scheduler}, training={"eval_steps": 5})
    (tmp_path / "config.yaml").write_text(store.dump(store.build(before)))
    now = composed_raw(
        scheduler={"name": scheduler}, training={"eval_steps": 6, "early_stopping_patience": 3}
    )
    found = compare_configs(tmp_path / "config.yaml", store.build(now))
    patience = "training.early_stopping_patience: None → 3"
    assert patience in found.allowed
    assert ("training.eval_steps: 5 → 6" in found.allowed) is free
    assert found.breaking == ([] if free else ["training.eval_steps: 5 → 6"])
