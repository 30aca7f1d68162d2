"""The loop adds little work to the step, and its bookkeeping is correct."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.training import loop
from launcher.training.metrics import MetricsBuffer, StepStats
from launcher.training.throughput import Work
from tests.helpers import conversions, parts
from tests.helpers.parts import Case, NoCheckpoints, Recorder


def count_conversions(rank_info: RankInfo, case: Case) -> list[torch.dtype]:
    """Dtypes of the tensors that one step turns into Python numbers."""
    train_state, loader = parts.set_up(rank_info, case)
    for step in range(2):  # FSDP initializes itself in the first
        parts.train_step(train_state.strategy, loader.step_batch(step))
    step_batch = loader.step_batch(2)
    with conversions.recorded() as seen:
        parts.train_step(train_state.strategy, step_batch)
    return [each.dtype for each in seen]


def walk_nothing(rank_info: RankInfo, case: Case) -> bool:
    """One step in which iterating over the model's parameters raises."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    parts.train_step(strategy, loader.step_batch(0))

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step walks over parameters")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parameters", "named_parameters", "state_dict"):
            patch.setattr(torch.nn.Module, name, forbidden)
        parts.train_step(strategy, loader.step_batch(1))
    return True


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_step_waits_only_for_a_token_count_on_the_cpu(
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


def fitted(rank_info: RankInfo, case: Case, log_steps: int) -> tuple[Recorder, list[int]]:
    train_state, loader = parts.set_up(rank_info, case)
    recorder, saves = Recorder(), NoCheckpoints()
    parts.fit(
        train_state,
        loader,
        parts.plan(7, eval_steps=3, save_steps=5, log_steps=log_steps),
        recorder,
        saves,
        evaluation=case.loader(rank_info.rank, rank_info.world_size, micro_batch_size=2),
    )
    return recorder, saves.steps


@pytest.mark.parametrize("log_steps", [1, 2, 100])
def test_events_happen_at_their_steps(
    ranks: Any, tiny: Path, rows_file: Path, log_steps: int
) -> None:
    case = Case(tiny, rows_file, strategy="single")
    ((recorder, saved),) = ranks.run(1, fitted, case, log_steps)
    assert saved == [5, 7]
    steps = recorder.column("step")
    assert steps == [1, 2, 3, 4, 5, 6, 7], "a line for every step, however seldom they are written"
    assert [record["step"] for record in recorder.evaluations] == [3, 6, 7]
    assert (recorder.calls[0], recorder.calls[-1]) == ("start 0 7", "finish")
    rates = recorder.column("learning_rate")
    assert rates[:4] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3]), "warm-up of three steps"


def fit_with(
    rank_info: RankInfo, case: Case, stop_at_look: int, fails_at: int | None
) -> tuple[int | str, list[int], Recorder]:
    """Rank 1 asks to stop at check `stop_at_look`, and its save of step `fails_at` fails."""
    train_state, loader = parts.set_up(rank_info, case)
    recorder = Recorder()
    saves = NoCheckpoints(fails_at if rank_info.rank == 1 else None)
    looks = iter(range(1, 1000))
    ended: int | str
    try:
        ended = parts.fit(
            train_state,
            loader,
            parts.plan(7, eval_steps=1, save_steps=2),
            recorder,
            saves,
            evaluation=case.loader(rank_info.rank, rank_info.world_size, micro_batch_size=2),
            stop_requested=lambda: rank_info.rank == 1 and next(looks) >= stop_at_look,
        )
    except UserError as error:
        ended = str(error)
    return ended, saves.steps, recorder


@pytest.mark.parametrize(("stop_at_look", "evaluations"), [(3, 0), (5, 0), (6, 1)])
def test_a_stop_inside_an_evaluation_ends_both_on_all_ranks_with_a_save(
    ranks: Any, tiny: Path, rows_file: Path, stop_at_look: int, evaluations: int
) -> None:
    """Steps 1 and 2 ask before step 1, the evaluation of 13 rows in steps of 6 asks three times,
    and step 3 asks before step 2."""
    case = Case(tiny, rows_file, strategy="ddp")
    for step, saved, recorder in ranks.run(2, fit_with, case, stop_at_look, None):
        assert step == 1 + evaluations
        assert saved[-1] == step
        assert len(recorder.evaluations) == evaluations


def test_a_save_that_failed_on_one_rank_ends_training_on_all(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    (there, saved, _), (here, _, _) = ranks.run(
        2, fit_with, Case(tiny, rows_file, strategy="ddp"), 1000, 2
    )
    assert here == "no space left"
    assert (there, saved) == (3, [2, 3]), "one step on; the true Saver raises on all ranks"


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
                parts.plain_loader(Case(tiny, rows_file, global_batch_size=13)).step_batch(0),
            ).item()
        )
        assert found == pytest.approx([expected] * world, rel=1e-6)


def evaluated(rank_info: RankInfo, case: Case) -> float:
    strategy = parts.set_up(rank_info, case)[0].strategy
    loader = case.loader(rank_info.rank, rank_info.world_size, micro_batch_size=2)
    value = loop.evaluate(strategy, loader, rank_info.device)
    assert strategy.model.training, "evaluation ends in training mode"
    return value


def evaluated_twice(rank_info: RankInfo, case: Case) -> tuple[float, float]:
    """After training, because a new adapter adds zero and dropout would have no effect."""
    strategy = parts.train(rank_info, case)[0].strategy
    loader = case.loader(rank_info.rank, rank_info.world_size, micro_batch_size=2)
    first, second = (loop.evaluate(strategy, loader, rank_info.device) for _ in range(2))
    return first, second


def test_evaluation_does_not_use_dropout(ranks: Any, tiny: Path, rows_file: Path) -> None:
    case = Case(
        tiny, rows_file, strategy="single", method_options={"dropout": 0.5}, steps=4,
        learning_rate=1e-2,
    )  # fmt: skip
    ((first, second),) = ranks.run(1, evaluated_twice, case)
    assert first == second


WORK = Work(targets=6, tokens=10, rows=2, positions=16, pairs=30)


def stats(loss: float, norm: float = 1.0) -> StepStats:
    return StepStats(torch.tensor(loss), torch.tensor(norm))


def test_the_buffer_sums_tokens_over_the_run() -> None:
    buffer = MetricsBuffer(sum=lambda values: values)
    buffer.add(1, 0.1, stats(2.0), WORK)
    buffer.add(2, 0.1, stats(1.5), WORK)
    assert [record["tokens"] for record in buffer.flush()] == [10, 20]
    assert buffer.flush() == []
    buffer.add(3, 0.1, stats(1.0), WORK)
    assert [(r["step"], r["loss"], r["tokens"]) for r in buffer.flush()] == [(3, 1.0, 30)]


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_nonfinite_step_ends_the_run_and_is_named(bad: tuple[float, float]) -> None:
    buffer = MetricsBuffer(sum=lambda values: values)
    buffer.add(1, 0.1, stats(2.0), WORK)
    buffer.add(2, 0.1, stats(*bad), WORK)
    with pytest.raises(UserError, match="step 2: loss"):
        buffer.flush()
