"""Go back to a checkpoint within an attempt, and leave out the batches that have spoiled the
training since. Collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from launcher.checkpoint import load
from launcher.config import Config
from launcher.distributed.collectives import on_all_ranks
from launcher.errors import StepError
from launcher.folders.checkpoint import Checkpoint, all_checkpoints
from launcher.folders.run import RunDir
from launcher.run import heartbeat, resume, retention
from launcher.training.state import Progress, TrainState

REWOUND = "rewound"  # begins the new names of checkpoints of steps that are trained again


def rewind(
    error: StepError, state: TrainState, run: RunDir, config: Config, log: Callable[[str], None]
) -> Progress:
    """Restore `state` from the newest whole checkpoint before the batches that `error` is blamed
    on, which are left out from then on. Checkpoints behind it are renamed.

    Raises `error` with the reason if there is none, or after too many rewinds at one place.
    """
    heartbeat.enter(heartbeat.Phase.LOAD)  # loading takes longer than a part of a step
    spikes = state.spikes
    before = list(spikes.left_out)
    first = spikes.blame(error)
    config = replace(config, resume="auto" if config.resume == "none" else config.resume)
    is_main = state.rank_info.is_main
    on_all_ranks(partial(_set_aside, config, run, first) if is_main else _nothing)
    checkpoint = load.choose_checkpoint(config, run.checkpoints, state.rank_info, log)
    if checkpoint is None or int(checkpoint.summary()["step"]) >= first:
        raise error.with_reason(
            f"training.on_spike=rewind finds no checkpoint of a step before {first} → a lower "
            "checkpoint.save_steps, or a higher checkpoint.keep_last"
        )
    kept = spikes.left_out, spikes.place, spikes.rewinds
    done = load.restore(checkpoint, state, config.resume_force)
    spikes.left_out, spikes.place, spikes.rewinds = kept
    new = ", ".join(str(batch) for batch in spikes.left_out if batch not in before)
    log(
        f"{error.summary}\ntraining.on_spike=rewind: training goes on from {checkpoint.path.name} "
        f"without batch {new}"
    )
    return done


def _set_aside(config: Config, run: RunDir, first: int) -> None:
    """Rename the run's checkpoints of step `first` and later, if there is an earlier one."""
    found = resume.candidates(config.resume, run.checkpoints)
    if not any(each.is_finished and _step(each) < first for each in found):
        return
    for checkpoint in all_checkpoints(run.checkpoints):
        if checkpoint.step >= first:
            retention.move_aside(checkpoint.path, REWOUND)


def _step(checkpoint: Checkpoint) -> int:
    return int(checkpoint.summary()["step"])


def _nothing() -> None:
    pass
