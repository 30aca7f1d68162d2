"""A training that goes back to a checkpoint equals one that never saw the batches it leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from launcher.checkpoint.rewind import rewind
from launcher.data.loader import batch_of
from launcher.distributed.process_group import RankInfo
from launcher.errors import SpikeError, StepError
from launcher.folders.run import RunDir
from launcher.run import heartbeat
from launcher.training.spikes import Spikes
from launcher.training.state import Progress
from tests.helpers import checkpoints, parts
from tests.helpers.checkpoints import END, six_steps
from tests.helpers.layouts import ONE_OF_EACH
from tests.helpers.parts import Case, Recorder

LAYOUTS = [
    pytest.param(*layout, marks=() if layout[0] in ("fsdp", "zero3") else pytest.mark.whole)
    for layout in ONE_OF_EACH
]


@dataclass
class Alarm(Spikes):
    """Takes the loss of some batches for a spike."""

    bad: tuple[int, ...] = ()

    def add(self, step: int, loss: float) -> None:
        if batch_of(step - 1, self.left_out) in self.bad:
            raise SpikeError(step, f"step {step} spikes; training stops here")
        super().add(step, loss)


def fit(
    rank_info: RankInfo, case: Case, folder: Path, bad: tuple[int, ...], **spikes: Any
) -> tuple[list[float], dict[str, Any], list[str]]:
    """Train with a save after every second step, and rewind at the `bad` batches. Returns the
    losses of the steps that count, the state of the spikes, and what was logged."""
    train_state, loader = parts.set_up(rank_info, case)
    train_state.spikes = Alarm(bad=bad, **spikes)
    saver = checkpoints.saver(train_state, case.config(), folder)
    done, recorder, said = Progress(), Recorder(), []
    losses: dict[int, float] = {}
    while True:
        left_out = tuple(train_state.spikes.left_out)
        try:
            parts.fit(
                *(train_state, replace(loader, left_out=left_out)),
                *(parts.plan(END, save_steps=2), recorder, saver),
                done=done,
            )
            break
        except StepError as error:
            with mock.patch.object(heartbeat, "enter") as enter:
                done = rewind(error, train_state, RunDir(folder), case.config(), said.append)
            enter.assert_any_call(heartbeat.Phase.LOAD)  # it has no limit of a part of a step
    losses.update(zip(recorder.column("step"), recorder.column("loss"), strict=True))
    return [losses[step] for step in range(1, END + 1)], train_state.spikes.state(), said


@pytest.mark.parametrize(("strategy", "world", "options"), LAYOUTS)
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.whole)])
def test_the_batch_is_left_out_as_if_it_had_never_been(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, method: str, strategy: str, world: int,
    options: Any,
) -> None:  # fmt: skip
    """To the bit, with dropout. Batch 4 is bad, and so is 5, which takes its place."""
    case = six_steps(tiny, rows_file, method, strategy, precision="bf16", strategy_options=options)
    without = ranks.run(world, fit, case, tmp_path / "without", (), left_out=[4, 5])
    rewound = ranks.run(world, fit, case, tmp_path / "rewound", (4, 5))
    for (expected, _, _), (losses, spikes, said) in zip(without, rewound, strict=True):
        assert losses == expected
        assert (spikes["left_out"], spikes["rewinds"], spikes["place"]) == ([4, 5], 2, 5)
        assert said == [
            f"step 5 spikes\ntraining.on_spike=rewind: training goes on from step-000004 without "
            f"batch {batch}"
            for batch in (4, 5)
        ]


def test_after_two_rewinds_the_batch_before_is_suspected_and_a_checkpoint_behind_it_set_aside(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    """What came with batch 3 shows in each later one; the checkpoint of step 4 is spoiled, too."""
    case = replace(six_steps(tiny, rows_file, "lora", "ddp"), global_batch_size=6)
    bad = (4, 5, 6)
    for losses, spikes, said in ranks.run(2, fit, case, tmp_path, bad):
        assert spikes["left_out"] == [3, 4, 5, 6]
        assert "goes on from step-000002 without batch 3, 6" in said[-1]
        assert len(losses) == END
    assert (tmp_path / "checkpoints/rewound-1-step-000004").is_dir()
    assert (tmp_path / "checkpoints/step-000004").is_dir()


def refused(rank_info: RankInfo, case: Case, folder: Path, bad: tuple[int, ...]) -> str:
    try:
        fit(rank_info, case, folder, bad)
    except StepError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ((1,), "finds no checkpoint of a step before 2 → a lower checkpoint.save_steps"),
        (tuple(range(5, 40)), "Training has gone back 5 times near step 6"),
    ],
)
def test_a_rewind_that_cannot_help_ends_the_run(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, bad: tuple[int, ...], said: str
) -> None:
    case = six_steps(tiny, rows_file, "lora", "ddp")
    for message in ranks.run(2, refused, case, tmp_path, bad):
        assert said in message
