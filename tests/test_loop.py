"""The loop does little besides the step, and its bookkeeping is right."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import loop
from launcher.distributed.process_group import Place
from launcher.errors import UserError
from launcher.loop import Plan, fit
from launcher.meter import Work
from launcher.metrics import Ledger, StepStats
from tests.helpers import parts
from tests.helpers.parts import Case

CONVERSIONS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy")


def count_conversions(place: Place, case: Case) -> list[torch.dtype]:
    """Dtypes of the tensors that one step turns into Python numbers."""
    strategy, _, loader = parts.set_up(place, case)
    for step in range(2):  # FSDP sets itself up in the first
        parts.train_step(strategy, loader.window(step))
    window = loader.window(2)
    seen: list[torch.dtype] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in CONVERSIONS:
            original = getattr(torch.Tensor, name)

            def counted(self: torch.Tensor, *args: Any, _original: Any = original) -> Any:
                seen.append(self.dtype)
                return _original(self, *args)

            patch.setattr(torch.Tensor, name, counted)
        parts.train_step(strategy, window)
    return seen


def walk_nothing(place: Place, case: Case) -> bool:
    """One step in which walking over the model's parameters raises."""
    strategy, _, loader = parts.set_up(place, case)
    parts.train_step(strategy, loader.window(0))

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step walks over parameters")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parameters", "named_parameters", "state_dict"):
            patch.setattr(torch.nn.Module, name, forbidden)
        parts.train_step(strategy, loader.window(1))
    return True


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_step_waits_for_nothing_but_a_token_count_on_the_cpu(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    case = Case(tiny, rows_file, strategy=strategy, global_batch_size=12)
    for seen in ranks.run(world, count_conversions, case):
        assert seen == [torch.int64]


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_step_does_no_work_over_frozen_parameters(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    assert all(ranks.run(world, walk_nothing, Case(tiny, rows_file, strategy=strategy)))


def test_the_loop_fits_on_a_screen() -> None:
    assert len(inspect.getsource(loop.train_step).splitlines()) <= 30
    assert len(inspect.getsource(loop.fit).splitlines()) <= 80


class Recorder:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.calls: list[str] = []

    def start(self, done_steps: int, total_steps: int) -> None:
        self.calls.append(f"start {done_steps} {total_steps}")

    def log(self, records: list[dict[str, Any]]) -> None:
        self.calls.append("log")
        self.records += records

    def finish(self) -> None:
        self.calls.append("finish")


class Saves:
    """Notes when it is asked to save; the save in the background of `fails_at` fails."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.fails_at = fails_at

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        self.finish()
        self.steps.append(step)

    def failed(self) -> bool:
        return self.fails_at in self.steps

    def finish(self) -> None:
        if self.failed():
            raise UserError("no space left")


def fitted(place: Place, case: Case, log_steps: int) -> tuple[Recorder, list[int], list[float]]:
    strategy, _, loader = parts.set_up(place, case)
    recorder, saves = Recorder(), Saves()
    fit(
        strategy,
        case.scheduler(strategy.optimizer),
        loader,
        case.loader(place.rank, place.world_size, 2),
        Plan(7, end_step=7, max_grad_norm=0.5, eval_steps=3, save_steps=5, log_steps=log_steps),
        [recorder],
        saves,
        place.device,
        halt=lambda: False,
    )
    return (
        recorder,
        saves.steps,
        [record["learning_rate"] for record in recorder.records if "loss" in record],
    )


@pytest.mark.parametrize("log_steps", [1, 2, 100])
def test_events_come_when_they_are_due(
    ranks: Any, tiny: Path, rows_file: Path, log_steps: int
) -> None:
    case = Case(tiny, rows_file, strategy="single")
    ((recorder, saved, rates),) = ranks.run(1, fitted, case, log_steps)
    assert saved == [5, 7]
    steps = [record["step"] for record in recorder.records if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6, 7], "a line for every step, however seldom they are written"
    assert [r["step"] for r in recorder.records if "eval_loss" in r] == [3, 6, 7]
    assert (recorder.calls[0], recorder.calls[-1]) == ("start 0 7", "finish")
    assert rates[:4] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3]), "warm-up of three steps"


def fit_with(
    place: Place, case: Case, halt_at: int, fails_at: int | None
) -> tuple[int | str, list[int], list[dict[str, Any]]]:
    """Rank 1 halts at its `halt_at`-th look, and its save of step `fails_at` fails."""
    strategy, _, loader = parts.set_up(place, case)
    recorder = Recorder()
    saves = Saves(fails_at if place.rank == 1 else None)
    looks = iter(range(1, 1000))
    ended: int | str
    try:
        ended = fit(
            strategy,
            case.scheduler(strategy.optimizer),
            loader,
            case.loader(place.rank, place.world_size, 2),
            Plan(7, end_step=7, max_grad_norm=0.5, eval_steps=1, save_steps=2, log_steps=1),
            [recorder],
            saves,
            place.device,
            halt=lambda: place.rank == 1 and next(looks) >= halt_at,
        )
    except UserError as error:
        ended = str(error)
    return ended, saves.steps, recorder.records


@pytest.mark.parametrize(("halt_at", "evaluations"), [(3, 0), (5, 1), (7, 1)])
def test_a_halt_inside_an_evaluation_ends_both_on_all_ranks_with_a_save(
    ranks: Any, tiny: Path, rows_file: Path, halt_at: int, evaluations: int
) -> None:
    """A step asks once, and an evaluation of 13 rows in windows of 6 three times."""
    for step, saved, records in ranks.run(
        2, fit_with, Case(tiny, rows_file, strategy="ddp"), halt_at, None
    ):
        assert step == 1 + evaluations * (halt_at > 5)
        assert saved == [step]
        assert sum("eval_loss" in record for record in records) == evaluations


def test_a_save_that_failed_on_one_rank_ends_training_on_all(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    (there, saved, _), (here, _, _) = ranks.run(
        2, fit_with, Case(tiny, rows_file, strategy="ddp"), 1000, 2
    )
    assert here == "no space left"
    assert (there, saved) == (2, [2]), "nobody steps on; the true Saver raises on all ranks"


def test_evaluation_is_the_mean_over_all_target_tokens(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    """Equal on any number of ranks, and to one forward over all rows."""
    expected = None
    for world in (1, 2, 3):
        found = ranks.run(world, evaluated, Case(tiny, rows_file, strategy="ddp"))
        expected = (
            expected
            or parts.plain_loss(
                parts.plain_model(Case(tiny, rows_file)),
                Case(tiny, rows_file, global_batch_size=13).loader(0, 1, 13).window(0),
            ).item()
        )
        assert found == pytest.approx([expected] * world, rel=1e-6)


def evaluated(place: Place, case: Case) -> float:
    strategy, _, _ = parts.set_up(place, case)
    value = loop.evaluate(strategy, case.loader(place.rank, place.world_size, 2), place.device)
    assert strategy.model.training, "evaluation ends in training mode"
    return value


def evaluated_twice(place: Place, case: Case) -> tuple[float, float]:
    """After training, for at the start an adapter adds nothing for dropout to drop."""
    strategy, _, _ = parts.train(place, case)
    loader = case.loader(place.rank, place.world_size, 2)
    first, second = (loop.evaluate(strategy, loader, place.device) for _ in range(2))
    return first, second


def test_evaluation_drops_nothing_out(ranks: Any, tiny: Path, rows_file: Path) -> None:
    case = Case(
        tiny, rows_file, strategy="single", method_options=(("dropout", 0.5),), steps=4,
        learning_rate=1e-2,
    )  # fmt: skip
    ((first, second),) = ranks.run(1, evaluated_twice, case)
    assert first == second


WORK = Work(targets=6, tokens=10, rows=2, positions=16, pairs=30)


def stats(loss: float, norm: float = 1.0) -> StepStats:
    return StepStats(torch.tensor(loss), torch.tensor(norm))


def test_the_ledger_adds_tokens_over_the_run() -> None:
    ledger = Ledger(sum=lambda values: values)
    ledger.add(1, 0.1, stats(2.0), WORK)
    ledger.add(2, 0.1, stats(1.5), WORK)
    assert [record["tokens"] for record in ledger.flush()] == [10, 20]
    assert ledger.flush() == []
    ledger.add(3, 0.1, stats(1.0), WORK)
    assert [(r["step"], r["loss"], r["tokens"]) for r in ledger.flush()] == [(3, 1.0, 30)]


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_stops_the_run_by_name(bad: tuple[float, float]) -> None:
    ledger = Ledger(sum=lambda values: values)
    ledger.add(1, 0.1, stats(2.0), WORK)
    ledger.add(2, 0.1, stats(*bad), WORK)
    with pytest.raises(UserError, match="step 2: loss"):
        ledger.flush()
