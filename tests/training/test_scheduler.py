"""Every schedule has the values of transformers' or torch's schedule, and resumes exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler

from launcher.config.schema.scheduler import SCHEDULERS
from launcher.training import lr_curve
from launcher.training.scheduler import Schedule, build_scheduler

PEAK, STEPS = 3e-4, 57

# (name, our settings, transformers' name if it differs, its keywords)
CURVES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("linear", {}, "", {}),
    ("cosine", {}, "", {}),
    ("cosine", {"cycles": 1.5}, "", {"num_cycles": 1.5}),
    ("cosine", {"minimum_rate": 3e-5}, "cosine_with_min_lr", {"min_lr": 3e-5}),
    ("cosine_with_restarts", {}, "", {}),
    ("cosine_with_restarts", {"cycles": 3}, "", {"num_cycles": 3}),
    ("polynomial", {}, "", {}),
    ("polynomial", {"power": 2.0}, "", {"power": 2.0}),
    ("polynomial", {"minimum_rate": 1e-5, "power": 0.7}, "", {"lr_end": 1e-5, "power": 0.7}),
    ("constant", {}, "", {}),
    ("constant_with_warmup", {}, "", {}),
    ("inverse_sqrt", {}, "", {}),
    ("inverse_sqrt", {"timescale": 40}, "", {"timescale": 40}),
]
LOSSES = [
    2.0,
    1.5,
    1.6,
    1.49999,
    1.5,
    1.4,
    1.5,
    1.5,
    1.5,
    1.5,
    1.2,
    1.3,
    float("nan"),
    1.2,
    1.2,
    1.2,
]


def optimizer(rates: tuple[float, ...] = (PEAK,)) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups, lr=PEAK)


def schedule(
    name: str, steps: int = STEPS, rates: tuple[float, ...] = (PEAK,), **options: Any
) -> Schedule:
    return build_scheduler(SCHEDULERS[name](name=name, **options), optimizer(rates), steps)


def walk(scheduler: Any, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([float(rate) for rate in scheduler.get_last_lr()])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 10, STEPS])
@pytest.mark.parametrize(("name", "ours", "theirs", "keywords"), CURVES)
def test_every_value_equals_transformers_to_the_bit(
    name: str, ours: dict[str, Any], theirs: str, keywords: dict[str, Any], warmup: int
) -> None:
    if name != "constant":
        ours = {**ours, "warmup_steps": warmup}
    rates = (PEAK, 16 * PEAK)
    peer = get_scheduler(theirs or name, optimizer(rates), warmup, STEPS, keywords)
    # At its last step, transformers' polynomial divides by the steps after the warm-up: zero.
    steps = STEPS - 1 if name == "polynomial" and warmup == STEPS else STEPS + 3
    expected = walk(peer, steps)
    assert walk(schedule(name, rates=rates, **ours), steps) == expected
    config = SCHEDULERS[name](name=name, **ours)
    assert (
        lr_curve.learning_rates(config, PEAK, STEPS)[:steps]
        == [rate for rate, _ in expected][:STEPS]
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_schedule_ends_at_its_minimum(name: str, warmup: int) -> None:
    config = SCHEDULERS[name](name=name, minimum_rate=1e-5, warmup_steps=warmup)
    assert PEAK * lr_curve.lr_factor(config, PEAK, STEPS, STEPS) == pytest.approx(1e-5)
    assert min(lr_curve.learning_rates(config, PEAK, STEPS)[warmup:]) > 1e-5


@pytest.mark.parametrize(("total", "steps"), [(100, 3), (101, 4), (10, 1)])
def test_a_warmup_ratio_is_rounded_up_like_in_transformers(total: int, steps: int) -> None:
    config = SCHEDULERS["linear"](name="linear", warmup_ratio=0.03)
    by_steps = SCHEDULERS["linear"](name="linear", warmup_steps=steps)
    assert lr_curve.learning_rates(config, PEAK, total) == lr_curve.learning_rates(
        by_steps, PEAK, total
    )


PLATEAUS = [
    {},
    {"patience": 1},
    {"patience": 0, "factor": 0.5, "threshold": 0.1},
    {"patience": 1, "factor": 0.3, "cooldown": 2, "minimum_rate": 5e-5},
]


def torch_s_own(options: dict[str, Any], rates: tuple[float, ...]) -> Any:
    keywords = {key: value for key, value in options.items() if key != "minimum_rate"}
    floor = options["minimum_rate"] if "minimum_rate" in options else 0.0
    floors = [floor * rate / PEAK for rate in rates]
    return ReduceLROnPlateau(optimizer(rates), min_lr=floors, **keywords)


@pytest.mark.parametrize("options", PLATEAUS)
@pytest.mark.parametrize("rates", [(PEAK,), (PEAK, 16 * PEAK)])
def test_plateau_equals_torch_on_the_same_losses(
    options: dict[str, Any], rates: tuple[float, ...]
) -> None:
    ours, theirs = (
        schedule("reduce_lr_on_plateau", rates=rates, **options),
        torch_s_own(options, rates),
    )
    for loss in LOSSES:
        ours.step()  # optimizer steps do not affect it
        ours.step_on_evaluation(loss)
        theirs.step(loss)
        assert ours.get_last_lr() == theirs.get_last_lr()


@pytest.mark.parametrize("options", PLATEAUS)
@pytest.mark.parametrize("at", range(len(LOSSES)))
def test_plateau_resumes_to_the_bit(options: dict[str, Any], at: int) -> None:
    whole, first, second = (schedule("reduce_lr_on_plateau", **options) for _ in range(3))
    for loss in LOSSES[:at]:
        whole.step_on_evaluation(loss)
        first.step_on_evaluation(loss)
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.state() == first.state()
    for loss in LOSSES[at:]:
        whole.step_on_evaluation(loss)
        second.step_on_evaluation(loss)
        assert second.get_last_lr() == whole.get_last_lr()


def test_a_changed_learning_rate_is_reduced_like_the_old_one() -> None:
    first = schedule("reduce_lr_on_plateau", patience=0, factor=0.5)
    for loss in (2.0, 2.0):
        first.step_on_evaluation(loss)
    second = build_scheduler(
        SCHEDULERS["reduce_lr_on_plateau"](name="reduce_lr_on_plateau"), optimizer((1e-2,)), STEPS
    )
    second.load_state(first.state())
    assert second.get_last_lr() == [pytest.approx(5e-3)]


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "reduce_lr_on_plateau"])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_a_schedule_resumes_to_the_bit(name: str, at: int) -> None:
    options = {} if name == "constant" else {"warmup_steps": 7}
    whole, first, second = (schedule(name, **options) for _ in range(3))
    rates = walk(whole, STEPS)
    walk(first, at)
    second.load_state(json.loads(json.dumps(first.state())))
    assert walk(second, STEPS - at) == rates[at:]
    plateau = schedule("reduce_lr_on_plateau")
    plateau.load_state(first.state())
    assert plateau.state()["steps"] == at, "under resume_force it begins to count from here"
