"""What is saved and read back goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import manifest
from launcher.checkpoint import load, resume
from launcher.checkpoint.layout import Checkpoint
from launcher.config import store
from launcher.distributed.process_group import Place
from launcher.errors import UserError
from launcher.loop import Plan, fit
from tests.helpers import parts
from tests.helpers.layouts import ONE_OF_EACH, pairwise
from tests.helpers.parts import Case

STOP, END = 3, 6
LAYOUTS = [
    pytest.param(*layout, marks=() if layout[0] in ("fsdp", "hsdp", "zero3") else pytest.mark.whole)
    for layout in ONE_OF_EACH
]


def run_steps(
    place: Place, case: Case, folder: Path, first: int, last: int, **options: Any
) -> list[float]:
    """Losses of steps [first, last): from the checkpoint of step `first`, if it is not 0; a
    checkpoint is saved at `last`."""
    torch.manual_seed(7 + place.rank)
    strategy, method, loader = parts.set_up(place, case)
    learner = parts.learner(place, case, strategy, method)
    saver = parts.saver(learner, folder, **options)
    if first:
        checkpoint = Checkpoint(folder / f"checkpoints/step-{first:06d}")
        torch.manual_seed(99)  # what is restored must not depend on it
        assert load.restore(checkpoint, learner, force=False).step == first
    strategy.model.train()
    losses = []
    for step in range(first, last):
        stats = parts.train_step(strategy, loader.window(step))
        learner.scheduler.step()
        losses.append(strategy.sum(stats.loss).item())
    saver.save(last, 0, None)
    saver.finish()
    return losses


def case_of(tiny: Path, rows_file: Path, method: str, strategy: str, **options: Any) -> Case:
    dropout = (("dropout", 0.1),) if method == "lora" else ()
    return Case(
        tiny, rows_file, method=method, strategy=strategy, method_options=dropout,
        global_batch_size=12, steps=END, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("strategy", "world", "options"), LAYOUTS)
def test_dropout_goes_on_where_it_stopped(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, world: int, options: Any
) -> None:
    """To the bit. test_matrix.py does so for every method and precision, without dropout."""
    case = case_of(tiny, rows_file, "lora", strategy, precision="bf16", strategy_options=options)
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(world, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(world, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(("zero3", 2), ("fsdp", 3)), (("fsdp", 3), ("zero2", 2)), (("zero1", 3), ("zero3", 2))],
)
def test_any_strategy_goes_on_on_any_number_of_ranks(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
    before: tuple[str, int],
    after: tuple[str, int],
) -> None:
    case = dataclasses.replace(case_of(tiny, rows_file, method, before[0]), method_options=())
    whole = ranks.run(before[1], run_steps, case, tmp_path / "whole", 0, END)[0]
    ranks.run(before[1], run_steps, case, tmp_path / "parts", 0, STOP)
    case = dataclasses.replace(case, strategy=after[0])
    found = ranks.run(after[1], run_steps, case, tmp_path / "parts", STOP, END)[0]
    assert found == pytest.approx(whole[STOP:], rel=1e-5)


def save_every_step(place: Place, case: Case, folder: Path) -> list[float]:
    """Train through as `fit` does, with a save in the background after every step."""
    torch.manual_seed(7 + place.rank)
    strategy, method, loader = parts.set_up(place, case)
    learner = parts.learner(place, case, strategy, method)
    saver = parts.saver(learner, folder, async_save=True)
    plan = Plan(END, END, parts.MAX_NORM, eval_steps=None, save_steps=1, log_steps=1)
    seen = Losses()
    fit(
        strategy, learner.scheduler, loader, None, plan, [seen], saver, place.device, lambda: False
    )  # fmt: skip
    return seen.losses


class Losses:
    """Observes the losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def start(self, done_steps: int, total_steps: int) -> None: ...
    def finish(self) -> None: ...
    def log(self, records: list[dict[str, Any]]) -> None:
        self.losses += [record["loss"] for record in records]


@pytest.mark.parametrize(
    ("method", "strategy", "world", "options"),
    pairwise(
        [("fsdp", 3, ()), ("ddp", 2, ()), ("zero1", 2, ()), ("zero3", 2, ())], ["full", "lora"]
    ),
)
def test_training_goes_on_while_a_checkpoint_is_written(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, method: str, strategy: str, world: int,
    options: Any,
) -> None:  # fmt: skip
    """What is written is the state of its step, whatever training has changed since."""
    case = case_of(tiny, rows_file, method, strategy, strategy_options=options)
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    assert ranks.run(world, save_every_step, case, tmp_path / "parts") == whole
    for step in range(1, END + 1):
        manifest.check(tmp_path / f"parts/checkpoints/step-{step:06d}/manifest.json")
    for step in (STOP, END - 1):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(tmp_path / "parts" / name, tmp_path / f"from-{step}" / name)
        found = ranks.run(world, run_steps, case, tmp_path / f"from-{step}", step, END)
        assert found == [losses[step:] for losses in whole]


def fail_on_one_rank(place: Place, case: Case, folder: Path) -> str:
    strategy, method, loader = parts.set_up(place, case)
    parts.train_step(strategy, loader.window(0))
    saver = parts.saver(parts.learner(place, case, strategy, method), folder)
    if place.rank == 1:
        saver._write_own = broken  # type: ignore[method-assign]
    try:
        saver.save(1, 0, None)
    except UserError as error:
        return str(error)
    return "no error"


def broken(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_on_one_rank_fails_on_all_with_its_cause(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = case_of(tiny, rows_file, "full", "fsdp")
    said = ranks.run(2, fail_on_one_rank, case, tmp_path)
    assert said == ["rank 1: OSError: [Errno 28] No space left on device"] * 2
    assert not list((tmp_path / "checkpoints").glob("step-*")), "half of one is none"


def test_weights_alone_can_be_exported_and_not_resumed(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = case_of(tiny, rows_file, "full", "zero2")
    ranks.run(2, weights_only, case, tmp_path)
    checkpoint = Checkpoint(tmp_path / "checkpoints/step-000001")
    names = {path.name for path in checkpoint.path.iterdir()}
    assert names >= {"model", "manifest.json"}
    assert "optimizer" not in names
    (problem,) = resume.problems(checkpoint, store.load(checkpoint.config))
    assert "holds weights only" in problem


def weights_only(place: Place, case: Case, folder: Path) -> None:
    run_steps(place, case, folder, 0, 1, content="weights")
