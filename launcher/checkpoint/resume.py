"""Whether and from where a run goes on. Imports no torch: the command line asks it, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.layout import MANIFEST, Checkpoint, finished, named
from launcher.config import Config, store
from launcher.config.scheduler import PlateauConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir

# What may change between two attempts: where and how it runs, and what is watched and kept. The
# same batch under another strategy, rank count or micro-batch gives the same sums.
FREE = (
    "run_dir",
    "resume",
    "resume_force",
    "strategy",
    "cluster",
    "checkpoint",
    "tracking",
    "launch",
    "model.name",
    "data.name",
    "data.path",  # its content is compared, not its place
    "data.dataset_info",
    "data.workers",
    "data.eval_path",
    "data.pad_to_multiple_of",
    "training.micro_batch_size",
    "training.activation_checkpointing",  # the same values
    "training.loss",  # the same sums
    "training.compile",
    "training.kernels",
    "training.eval_steps",
    "training.early_stopping_patience",
    "training.early_stopping_threshold",
    "training.log_steps",
    "training.stop_after_steps",
)
# ... unless the learning rate goes by the evaluations.
EVALUATION = ("training.eval_steps", "data.eval_path")
# What the stored tensors are made for: under another one they fit nowhere.
SHAPING = (
    "method.name",
    "method.rank",
    "method.rank_pattern",
    "method.target_modules",
    "method.modules_to_save",
    "method.dora",
    "method.layers",
    "method.modules",
    "method.extra_modules",
    "optimizer.name",
)


@dataclass(frozen=True)
class Differences:
    """`key: old → new`, one a setting."""

    free: list[str]
    breaking: list[str]  # what is learnt changes
    shaping: list[str]  # what is stored does not fit


def candidates(resume: str, checkpoints: Path) -> list[Checkpoint]:
    """Where to go on from, best first: the run's own checkpoints, whole or not, then the one that
    is asked for."""
    if resume == "none":
        return []
    return named(checkpoints) + ([] if resume == "auto" else [asked_for(resume)])


def asked_for(resume: str) -> Checkpoint:
    """The checkpoint of `resume=PATH`: a checkpoint's folder, or a run's newest.

    Raises UserError when it is neither.
    """
    path = Path(resume)
    if (path / MANIFEST).is_file():
        return Checkpoint(path.absolute())
    found = finished(RunDir(path).checkpoints)
    if not found:
        raise UserError(
            f"resume={resume} is neither a checkpoint ({MANIFEST}) nor a run that holds one; "
            "name one, or resume=auto with run_dir=RUN"
        )
    return found[0]


def differences(frozen: Path, config: Config) -> Differences:
    """How `config` differs from the frozen one of a checkpoint."""
    before, now = store.leaves(store.load(frozen)), store.leaves(config)
    found = Differences([], [], [])
    for key in dict.fromkeys([*before, *now]):
        old, new = (side[key] if key in side else None for side in (before, now))
        if old != new:
            free = any(key == each or key.startswith(f"{each}.") for each in FREE) and not (
                key in EVALUATION and isinstance(config.scheduler, PlateauConfig)
            )
            shaping = any(key == each or key.startswith(f"{each}.") for each in SHAPING)
            kind = found.free if free else found.shaping if shaping else found.breaking
            kind.append(f"{key}: {old} → {new}")
    return found


def problems(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Why `config` cannot go on from `checkpoint`; empty when it can."""
    if checkpoint.summary()["content"] != "all":
        return [
            f"{checkpoint.path} holds weights only (checkpoint.content=weights), which can be "
            "exported and not resumed → name another checkpoint with resume=PATH, or resume=none"
        ]
    changed = differences(checkpoint.config, config)
    if changed.shaping:
        return [
            f"{checkpoint.path.name} holds other tensors ({'; '.join(changed.shaping)}) → set them "
            "back, or begin anew with resume=none"
        ]
    if changed.breaking and not config.resume_force:
        return [
            f"{checkpoint.path.name} was trained otherwise ({'; '.join(changed.breaking)}), so "
            "going on would not continue that training → set them back, or resume_force=true"
        ]
    return []


def set_aside(checkpoint: Checkpoint) -> None:
    """Take a broken checkpoint's name away, so that its step can be saved again."""
    number = 1
    while (aside := checkpoint.path.with_name(f"broken-{number}-{checkpoint.path.name}")).exists():
        number += 1
    checkpoint.path.rename(aside)
