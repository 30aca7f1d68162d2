"""Decisions by the evaluation loss are equal on all ranks and survive a stop to the bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from launcher.distributed.process_group import RankInfo
from launcher.folders.checkpoint import finished_checkpoints
from launcher.run.retention import checkpoints_to_delete
from launcher.training import loop
from tests.helpers import checkpoints, parts
from tests.helpers.parts import Case, Recorder

END = 8
FACTOR, PATIENCE, THRESHOLD = 0.5, 1, 0.9  # no evaluation improves by nine tenths


@dataclass
class Ended:
    """What a rank has recorded of a run, or of a part of it."""

    step: int
    reason: str | None
    rates: list[float]
    losses: list[float]
    evaluated: list[tuple[int, float]]

    def __add__(self, later: Ended) -> Ended:
        return Ended(
            later.step,
            later.reason,
            self.rates + later.rates,
            self.losses + later.losses,
            self.evaluated + later.evaluated,
        )


@dataclass(frozen=True)
class Part:
    """A run to `stop`, from a checkpoint if `first` is not 0."""

    first: int = 0
    stop: int = END
    stop_at_look: int = 10**6  # rank 0 asks to stop at its check with this number
    patience: int | None = None
    threshold: float = 0.0
    plan: dict[str, Any] = field(default_factory=dict)


def run_part_with(
    rank_info: RankInfo, case: Case, folder: Path, part: Part, eval_losses: list[float]
) -> Ended:
    """A run with these evaluation losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: eval_losses.pop(0))
        return run_part(rank_info, case, folder, part)


def run_part(rank_info: RankInfo, case: Case, folder: Path, part: Part) -> Ended:
    case = case.with_training(
        early_stopping_patience=part.patience, early_stopping_threshold=part.threshold
    )
    train_state, loader = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, case.config(), folder)
    recorder, looks = Recorder(), iter(range(1, 10**6))
    last = parts.fit(
        train_state,
        loader,
        parts.plan(END, **{"end_step": part.stop, "eval_steps": 2, "log_steps": 3, **part.plan}),
        recorder,
        saver,
        evaluation=case.loader(rank_info.rank, rank_info.world_size, micro_batch_size=2),
        stop_requested=lambda: rank_info.rank == 0 and next(looks) >= part.stop_at_look,
        done=checkpoints.restore(train_state, folder, part.first) if part.first else None,
    )
    return Ended(
        last,
        train_state.early_stopping.reason(),
        recorder.column("learning_rate"),
        recorder.column("loss"),
        [(record["step"], record["eval_loss"]) for record in recorder.evaluations],
    )


def case_of(tiny: Path, rows_file: Path, strategy: str) -> Case:
    plateau = {"factor": FACTOR, "patience": PATIENCE, "threshold": THRESHOLD}
    return Case(
        tiny, rows_file, strategy=strategy, scheduler="reduce_lr_on_plateau",
        scheduler_options=plateau, global_batch_size=12, steps=END,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "world", "stops"),
    [
        ("fsdp", 3, [5, 6]),
        pytest.param("single", 1, [5], marks=pytest.mark.whole),
        pytest.param("zero2", 2, [5], marks=pytest.mark.whole),
    ],
)
def test_plateau_equals_torch_on_the_evaluations_and_resumes_to_the_bit(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    strategy: str,
    world: int,
    stops: list[int],
) -> None:
    case = case_of(tiny, rows_file, strategy)
    whole = ranks.run(world, run_part, case, tmp_path / "whole", Part())
    assert all(rank == whole[0] for rank in whole)
    assert [step for step, _ in whole[0].evaluated] == [2, 4, 6, 8]
    assert whole[0].rates == rates_by_torch([loss for _, loss in whole[0].evaluated])
    assert len(set(whole[0].rates)) == 2, "it has been reduced once, after steps 4 and 6"
    # 5: an evaluation that only the stop causes does not reach the schedule.
    for stop in stops:
        folder = tmp_path / f"parts-{stop}"
        first = ranks.run(world, run_part, case, folder, Part(stop=stop))
        second = ranks.run(world, run_part, case, folder, Part(first=stop))
        found = first[0] + second[0]
        found.evaluated = [each for each in found.evaluated if each[0] != 5]
        assert found == whole[0]


def rates_by_torch(losses: list[float]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    peer = ReduceLROnPlateau(optimizer, factor=FACTOR, patience=PATIENCE, threshold=THRESHOLD)
    rates = []
    for step in range(1, END + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        if step % 2 == 0:
            peer.step(losses.pop(0))
    return rates


def test_an_evaluation_that_a_stop_interrupted_is_run_after_resuming(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Rank 0 checks once a step and twice in an evaluation: check 8 is in that of step 4."""
    case = case_of(tiny, rows_file, "fsdp")
    whole = ranks.run(2, run_part, case, tmp_path / "whole", Part())[0]
    first = ranks.run(2, run_part, case, tmp_path / "parts", Part(stop_at_look=8))[0]
    assert (first.step, [step for step, _ in first.evaluated]) == (4, [2])
    second = ranks.run(2, run_part, case, tmp_path / "parts", Part(first=4))[0]
    assert first + second == whole


@pytest.mark.parametrize(("strategy", "world"), [("hsdp", 2), ("zero3", 2)])
def test_training_ends_when_the_evaluation_loss_has_stalled(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, world: int
) -> None:
    """A checkpoint of that step contains its loss, and training can resume from it on request."""
    case = dataclasses.replace(case_of(tiny, rows_file, strategy), learning_rate=1e-6)
    impatient = Part(patience=2, threshold=1.0)
    ended = ranks.run(world, run_part, case, tmp_path, impatient)
    assert all(rank == ended[0] for rank in ended)
    assert ended[0].step == 6, "evaluations 2 and 3 are no better than the first, by 1"
    assert "early_stopping_patience=2: eval_loss has not improved in 2 eval" in ended[0].reason
    (checkpoint,) = finished_checkpoints(tmp_path / "checkpoints")
    assert checkpoint.summary()["eval_loss"] == ended[0].evaluated[-1][1]
    again = ranks.run(world, run_part, case, tmp_path, dataclasses.replace(impatient, first=6))[0]
    assert (again.step, again.losses, again.reason) == (6, [], ended[0].reason)
    further = ranks.run(world, run_part, case, tmp_path, Part(first=6))[0]
    whole = ranks.run(world, run_part, case, tmp_path / "whole", Part())[0]
    assert ended[0] + further == whole


def test_patience_count_survives_a_stop(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = dataclasses.replace(case_of(tiny, rows_file, "ddp"), learning_rate=1e-6)
    impatient = Part(patience=2, threshold=1.0)
    ranks.run(2, run_part, case, tmp_path, dataclasses.replace(impatient, stop=5))
    ended = ranks.run(2, run_part, case, tmp_path, dataclasses.replace(impatient, first=5))
    assert [rank.step for rank in ended] == [6, 6]


def test_the_best_checkpoint_is_saved_as_soon_as_it_is_found(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    part = Part(plan={"save_best": True, "save_steps": 6})
    losses = [2.0, 1.0, 1.5, 1.2]
    ranks.run(2, run_part_with, case_of(tiny, rows_file, "fsdp"), tmp_path, part, losses)
    saved = {
        each.step: each.summary()["eval_loss"]
        for each in finished_checkpoints(tmp_path / "checkpoints")
    }
    assert saved == {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    assert {
        each.step
        for each in checkpoints_to_delete(finished_checkpoints(tmp_path / "checkpoints"), 1)
    } == {
        2,
        6,
    }
