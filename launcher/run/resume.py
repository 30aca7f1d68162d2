"""Whether a run can resume, and from which checkpoint. Imports no torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import SECTIONS, Config, store
from launcher.config.overrides import format_value
from launcher.config.schema.scheduler import PlateauConfig
from launcher.errors import UserError
from launcher.folders.checkpoint import (
    MANIFEST,
    Checkpoint,
    all_checkpoints,
    describe_skipped,
    finished_checkpoints,
)
from launcher.folders.run import RunDir

# Settings that may change between two attempts: where and how the run is executed, and what is
# logged and kept. The same batch with another strategy, number of ranks or micro-batch size has the
# same sums.
ALLOWED_SETTINGS = (
    "run_dir",
    "strategy",
    "cluster",
    "checkpoint",
    "tracking",
    "launch",
    "model.name",
    "data.name",
    "data.path",  # the content of the file is compared, not its path
    "data.too_long",  # the rows are compared, not what would happen to longer ones
    "data.template_date",  # likewise
    "data.dataset_info",
    "data.workers",
    "data.row_seconds",
    "data.eval_path",
    "data.pad_to_multiple_of",
    "training.micro_batch_size",
    "training.activation_checkpointing",  # the same values
    "training.loss",  # the same sums
    "training.compile",
    "training.kernels",
    "training.deterministic",  # the same sums, in another order
    "training.on_spike",
    "training.spike_threshold",
    "training.spike_window",
    "training.eval_steps",
    "training.early_stopping_patience",
    "training.early_stopping_threshold",
    "training.log_steps",
    "training.stop_after_steps",
)
# ... except these, if the learning rate depends on the evaluations.
EVALUATION_SETTINGS = ("training.eval_steps", "data.eval_path")
# Settings that ask for the resumption itself: no difference between the trainings.
REQUEST_SETTINGS = ("resume", "resume_force")
# Settings that determine which tensors a checkpoint contains, and their shapes.
TENSOR_SETTINGS = (
    "model.add_tokens",
    "method.name",
    "method.rank",
    "method.rank_pattern",
    "method.target_modules",
    "method.target_router",
    "method.modules_to_save",
    "method.dora",
    "method.layers",
    "method.modules",
    "method.extra_modules",
    "optimizer.name",
)


@dataclass(frozen=True)
class Differences:
    """Settings that differ, each as `key: old → new`."""

    allowed: list[str]
    breaking: list[str]  # the training would not be the same
    incompatible: list[str]  # the tensors of the checkpoint do not fit
    undo: list[str]  # the overrides that set the breaking and incompatible ones back


def candidates(resume: str, checkpoints: Path) -> list[Checkpoint]:
    """The checkpoints to resume from, best first: the run's own ones, complete or not, then the one
    that `resume` names."""
    if resume == "none":
        return []
    named = [] if resume == "auto" else [named_checkpoint(resume)]
    return all_checkpoints(checkpoints) + named


def resumed_config(config: Config, run: RunDir) -> Config | None:
    """The configuration of the checkpoint that `config`, a run in the folder of `run`, resumes
    from; None without one. Raises UserError if resume=PATH names none."""
    found = (c for c in candidates(config.resume, run.checkpoints) if c.is_finished)
    checkpoint = next(found, None)
    return None if checkpoint is None else store.load(checkpoint.config)


def named_checkpoint(resume: str) -> Checkpoint:
    """The checkpoint of `resume=PATH`: that folder, or the newest checkpoint of that run.

    Raises UserError if PATH is neither a checkpoint nor a run with one.
    """
    path = Path(resume)
    if (path / MANIFEST).is_file():
        checkpoint = Checkpoint(path.absolute())
        if damage := checkpoint.find_damage():
            raise UserError(f"resume={resume} is broken: {damage} → choose an earlier checkpoint")
        return checkpoint
    finished = finished_checkpoints(RunDir(path).checkpoints)
    if not finished:
        if skipped := describe_skipped(RunDir(path).checkpoints):
            raise UserError(f"resume={resume} is broken: {'; '.join(skipped)}")
        raise UserError(
            f"resume={resume} is neither a checkpoint ({MANIFEST}) nor a run that contains one; "
            "choose one that exists, or resume=auto with run_dir=RUN"
        )
    return finished[0]


def compare_configs(frozen: Path, config: Config) -> Differences:
    """How `config` differs from the frozen configuration of a checkpoint."""
    trained = store.load(frozen)
    before, now = store.leaves(trained), store.leaves(_as_trained(config, trained))
    differences = Differences([], [], [], [])
    for key in dict.fromkeys([*before, *now]):
        old, new = (side[key] if key in side else None for side in (before, now))
        if old == new or key in REQUEST_SETTINGS:
            continue
        schedule_depends_on_it = key in EVALUATION_SETTINGS and isinstance(
            config.scheduler, PlateauConfig
        )
        # The rows of a stream are not compared.
        reads_other_rows = key == "data.too_long" and config.data.streaming
        depends = schedule_depends_on_it or reads_other_rows
        if _is_one_of(key, ALLOWED_SETTINGS) and not depends:
            group = differences.allowed
        elif _is_one_of(key, TENSOR_SETTINGS):
            group = differences.incompatible
        else:
            group = differences.breaking
        group.append(f"{key}: {old} → {new}")
        if group is differences.allowed:
            continue
        if key in before:
            differences.undo.append(_override(key, old))
        elif store.mapping_setting(key):  # other keys come and go with the file of their group
            differences.undo.append(f"~{key}")
    return differences


def _as_trained(config: Config, trained: Config) -> Config:
    """`config` with the choices of a checkpoint's configuration where it has auto: launcher/run/
    auto.py keeps them."""
    kept = {
        section: getattr(trained, section)
        for section in ("precision", "strategy")
        if getattr(config, section).name == "auto"
    }
    return dataclasses.replace(config, **kept)


def _override(key: str, value: Any) -> str:
    """The override that sets `key` on the command line, where `.name` is the file of a group."""
    section, _, name = key.partition(".")
    is_file = name == "name" and isinstance(SECTIONS[section], dict)
    return f"{section if is_file else key}={format_value(value)}"


def _is_one_of(key: str, settings: Iterable[str]) -> bool:
    """Whether `key` is one of `settings`, or inside one of them."""
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)


def find_problems(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Why a run with `config` cannot resume from `checkpoint`; empty if it can."""
    if checkpoint.summary()["content"] != "all":
        return [
            f"{checkpoint.path} contains only weights (checkpoint.content=weights), so it can be "
            "exported but not resumed → choose another checkpoint with resume=PATH, or resume=none"
        ]
    differences = compare_configs(checkpoint.config, config)
    if differences.incompatible:
        return [
            f"{checkpoint.path.name} contains other tensors ({'; '.join(differences.incompatible)})"
            f" → {_typed(differences)}, or start from scratch with resume=none"
        ]
    if differences.breaking and not config.resume_force:
        return [
            f"{checkpoint.path.name} was trained with other settings "
            f"({'; '.join(differences.breaking)}), so resuming would not continue that training "
            f"→ {_typed(differences)}, or resume_force=true"
        ]
    return []


def _typed(differences: Differences) -> str:
    return shlex.join(differences.undo)
