"""What goes by the evaluation loss is alike on all ranks and survives a stop to the bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from launcher import loop
from launcher.checkpoint import load
from launcher.checkpoint.layout import Checkpoint, finished
from launcher.checkpoint.retention import surplus
from launcher.config.scheduler import PlateauConfig
from launcher.distributed.process_group import Place
from launcher.loop import Plan, fit
from launcher.scheduler import build_scheduler
from launcher.watch import Watch
from tests.helpers import parts
from tests.helpers.parts import Case

END = 8
FACTOR, PATIENCE, THRESHOLD = 0.5, 1, 0.9  # no evaluation improves by nine tenths


@dataclass(frozen=True)
class PlateauCase(Case):
    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        config = PlateauConfig(
            name="reduce_lr_on_plateau", factor=FACTOR, patience=PATIENCE, threshold=THRESHOLD
        )
        return build_scheduler(config, optimizer, self.steps)


@dataclass
class Ended:
    """What a rank has seen of a run, or of a part of it."""

    step: int = 0
    reason: str | None = None
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluated: list[tuple[int, float]] = field(default_factory=list)

    def start(self, done_steps: int, total_steps: int) -> None: ...
    def finish(self) -> None: ...
    def log(self, records: list[dict[str, Any]]) -> None:
        self.rates += [record["learning_rate"] for record in records if "loss" in record]
        self.losses += [record["loss"] for record in records if "loss" in record]
        self.evaluated += [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]

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
    """A run from a checkpoint, if `first` is not 0, to `stop`."""

    first: int = 0
    stop: int = END
    halt_at: int = 10**6  # rank 0 halts at this look of its own
    patience: int | None = None
    threshold: float = 0.0
    plan: dict[str, Any] = field(default_factory=dict)


def run_part_with(
    place: Place, case: Case, folder: Path, part: Part, eval_losses: list[float]
) -> Ended:
    """… with these evaluation losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: eval_losses.pop(0))
        return run_part(place, case, folder, part)


def run_part(place: Place, case: Case, folder: Path, part: Part) -> Ended:
    torch.manual_seed(7 + place.rank)
    strategy, method, loader = parts.set_up(place, case)
    watch = Watch(part.patience, part.threshold)
    learner = parts.learner(place, case, strategy, method, watch=watch)
    saver = parts.saver(learner, folder)
    if part.first:
        checkpoint = Checkpoint(folder / f"checkpoints/step-{part.first:06d}")
        load.restore(checkpoint, learner, force=False)
    plan = {"eval_steps": 2, "save_steps": None, "log_steps": 3, **part.plan}
    ended, looks = Ended(), iter(range(1, 10**6))
    ended.step = fit(
        strategy,
        learner.scheduler,
        loader,
        case.loader(place.rank, place.world_size, 2),
        Plan(END, part.stop, parts.MAX_NORM, **plan),
        [ended],
        saver,
        place.device,
        halt=lambda: place.rank == 0 and next(looks) >= part.halt_at,
        done_steps=part.first,
        watch=watch,
    )
    ended.reason = watch.reason()
    return ended


def case_of(tiny: Path, rows_file: Path, strategy: str) -> PlateauCase:
    return PlateauCase(tiny, rows_file, strategy=strategy, global_batch_size=12, steps=END)


@pytest.mark.parametrize(
    ("strategy", "world", "stops"),
    [
        ("fsdp", 3, [5, 6]),
        pytest.param("single", 1, [5], marks=pytest.mark.whole),
        pytest.param("zero2", 2, [5], marks=pytest.mark.whole),
    ],
)
def test_a_plateau_is_torch_s_on_the_evaluations_and_goes_on_to_the_bit(
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
    # 5: an evaluation that only the stop brings about says nothing to the schedule.
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


def test_an_evaluation_that_a_halt_cut_off_is_made_up_for(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Rank 0 looks once a step and twice in an evaluation: the eighth look is in that of step 4."""
    case = case_of(tiny, rows_file, "fsdp")
    whole = ranks.run(2, run_part, case, tmp_path / "whole", Part())[0]
    first = ranks.run(2, run_part, case, tmp_path / "parts", Part(halt_at=8))[0]
    assert (first.step, [step for step, _ in first.evaluated]) == (4, [2])
    second = ranks.run(2, run_part, case, tmp_path / "parts", Part(first=4))[0]
    assert first + second == whole


@pytest.mark.parametrize(("strategy", "world"), [("hsdp", 2), ("zero3", 2)])
def test_training_ends_when_the_evaluation_loss_has_stalled(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, world: int
) -> None:
    """… with a checkpoint of that step, which holds its loss; and goes on when it is told to."""
    case = dataclasses.replace(case_of(tiny, rows_file, strategy), learning_rate=1e-6)
    impatient = Part(patience=2, threshold=1.0)
    ended = ranks.run(world, run_part, case, tmp_path, impatient)
    assert all(rank == ended[0] for rank in ended)
    assert ended[0].step == 6, "evaluations 2 and 3 are no better than the first, by 1"
    assert "early_stopping_patience=2: eval_loss has not improved in 2 eval" in ended[0].reason
    (checkpoint,) = finished(tmp_path / "checkpoints")
    assert checkpoint.summary()["eval_loss"] == ended[0].evaluated[-1][1]
    again = ranks.run(world, run_part, case, tmp_path, dataclasses.replace(impatient, first=6))[0]
    assert (again.step, again.losses, again.reason) == (6, [], ended[0].reason)
    further = ranks.run(world, run_part, case, tmp_path, Part(first=6))[0]
    whole = ranks.run(world, run_part, case, tmp_path / "whole", Part())[0]
    assert ended[0] + further == whole


def test_patience_is_counted_over_a_stop(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = dataclasses.replace(case_of(tiny, rows_file, "ddp"), learning_rate=1e-6)
    impatient = Part(patience=2, threshold=1.0)
    ranks.run(2, run_part, case, tmp_path, dataclasses.replace(impatient, stop=5))
    ended = ranks.run(2, run_part, case, tmp_path, dataclasses.replace(impatient, first=5))
    assert [rank.step for rank in ended] == [6, 6]


def test_the_best_is_saved_when_it_is_found(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    part = Part(plan={"save_best": True, "save_steps": 6})
    losses = [2.0, 1.0, 1.5, 1.2]
    ranks.run(2, run_part_with, case_of(tiny, rows_file, "fsdp"), tmp_path, part, losses)
    saved = {each.step: each.summary()["eval_loss"] for each in finished(tmp_path / "checkpoints")}
    assert saved == {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    assert {each.step for each in surplus(finished(tmp_path / "checkpoints"), 1)} == {2, 6}
