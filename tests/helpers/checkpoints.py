"""Train with saves, stop, and resume from the saved state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint import load
from launcher.checkpoint.save import Saver
from launcher.config import Config, store
from launcher.distributed.process_group import RankInfo
from launcher.folders.checkpoint import Checkpoint
from launcher.folders.run import RunDir
from launcher.strategy import Strategy
from launcher.training.state import Progress, TrainState
from tests.helpers import parts
from tests.helpers.parts import Case

STOP, END = 3, 6
QUESTION = torch.arange(3, 60).view(1, -1)


def saver(
    train_state: TrainState, config: Config, folder: Path, kind: type[Saver] = Saver, **options: Any
) -> Saver:
    """The saver of a run in `folder`. `options`: changes to the section `checkpoint`."""
    config = replace(config, checkpoint=replace(config.checkpoint, **options))
    run = RunDir(folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    if train_state.rank_info.is_main:  # another rank's write would be half done as this one reads
        run.config.write_text(store.dump(config))
    return kind(train_state, run, config.checkpoint, config.launch)


def restore(train_state: TrainState, folder: Path, step: int) -> Progress:
    """Restore the checkpoint of `step` of the run in `folder`."""
    torch.manual_seed(99)  # the restored state must not depend on it
    checkpoint = Checkpoint(folder / f"checkpoints/step-{step:06d}")
    done = load.restore(checkpoint, train_state, force=False)
    assert done.step == step
    return done


def train_from(
    rank_info: RankInfo, case: Case, folder: Path, first: int, last: int, **options: Any
) -> tuple[TrainState, list[float]]:
    """Train steps `first` + 1 to `last`, from the checkpoint of step `first` if it is not 0. Save a
    checkpoint at `last`. Return the losses of these steps."""
    train_state, loader = parts.set_up(rank_info, case)
    checkpoints = saver(train_state, case.config(), folder, **options)
    done = restore(train_state, folder, first) if first else Progress()
    recorder = parts.Recorder()
    parts.fit(
        train_state,
        loader,
        parts.plan(case.steps, end_step=last),
        recorder,
        checkpoints,
        done=done,
    )
    return train_state, recorder.column("loss")


def run_steps(
    rank_info: RankInfo, case: Case, folder: Path, first: int, last: int, **options: Any
) -> list[float]:
    return train_from(rank_info, case, folder, first, last, **options)[1]


def save_every_step(rank_info: RankInfo, case: Case, folder: Path) -> list[float]:
    """Train without a stop, with a save in the background after every step."""
    train_state, loader = parts.set_up(rank_info, case)
    checkpoints = saver(train_state, case.config(), folder, async_save=True)
    recorder = parts.Recorder()
    parts.fit(train_state, loader, parts.plan(END, save_steps=1), recorder, checkpoints)
    return recorder.column("loss")


def save_and_answer(rank_info: RankInfo, case: Case, folder: Path) -> torch.Tensor:
    """Train to the end and save a checkpoint; return the logits of the trained model."""
    train_state, _ = train_from(rank_info, case, folder, 0, case.steps)
    return answer(train_state.strategy)


def answer(strategy: Strategy) -> torch.Tensor:
    """The logits of QUESTION."""
    strategy.model.eval()
    with torch.no_grad():
        logits: torch.Tensor = strategy.model(input_ids=QUESTION).logits
    return logits


def six_steps(model: Path, data: Path, method: str, strategy: str, **options: Any) -> Case:
    """A case to stop in the middle, with dropout, which draws from the random state."""
    dropout = {"dropout": 0.1} if method == "lora" else {}
    return Case(
        model, data, method=method, strategy=strategy, method_options=dropout,
        global_batch_size=12, steps=END, **options,
    )  # fmt: skip
