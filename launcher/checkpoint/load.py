"""Resume from a checkpoint: choose it, and restore its content. Every function is collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint import dcp
from launcher.config import Config
from launcher.distributed.collectives import on_all_ranks
from launcher.distributed.file_sync import FileSync
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.checkpoint import MANIFEST, MODEL, Checkpoint
from launcher.folders.json_file import COUNT, NUMBER, OBJECT, check_fields, read_object
from launcher.io.readers.safetensors_file import read_tensors
from launcher.io.tensor.disk import close_files
from launcher.run import resume, retention
from launcher.training import rng
from launcher.training.state import Progress, TrainState

TRAINER_FIELDS = {
    **dict.fromkeys(("step", "tokens", "ranks", "shards"), COUNT),
    **dict.fromkeys(("counts", "schedule", "evaluations", "spikes", "loss_scale"), OBJECT),
    "eval_loss": NUMBER,
}
Log = Callable[[str], None]


def choose_checkpoint(
    config: Config, checkpoints: Path, rank_info: RankInfo, log: Log
) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start from scratch. Its files match its manifest
    and are on every machine.

    Broken checkpoints of this run are reported, renamed and skipped. Raises UserError if the one
    that `resume=PATH` names is broken, or if the configuration has changed in a setting that
    changes the training.
    """
    file_sync = FileSync(rank_info, config.launch.shared_disk)
    cleans = rank_info.is_main or file_sync.is_node_leader
    on_all_ranks(partial(retention.delete_leftovers, checkpoints) if cleans else _nothing)
    find = partial(resume.candidates, config.resume, checkpoints)
    broadcast: list[list[Checkpoint] | None] = [on_all_ranks(find if rank_info.is_main else _none)]
    dist.broadcast_object_list(broadcast)
    for original in broadcast[0] or []:
        # On another machine, this machine's copy.
        checkpoint = (
            Checkpoint(checkpoints / original.path.name) if file_sync.is_remote else original
        )
        on_all_ranks(partial(file_sync.broadcast, checkpoint.path, MANIFEST))
        problems = _find_damage(checkpoint, rank_info)
        _on_main(partial(_refuse, original, config, checkpoints, problems), rank_info)
        if not problems:
            return checkpoint
        log(f"{checkpoint.path.name} is broken and skipped: {'; '.join(problems)}")
        _on_main(partial(_move_aside, original), rank_info)
    if broadcast[0]:
        log("no checkpoint is left to resume from: training starts at step 0")
    return None


def _on_main(action: Callable[[], None], rank_info: RankInfo) -> None:
    """Call `action` on rank 0; all ranks raise UserError if it raises."""
    on_all_ranks(action if rank_info.is_main else _nothing)


def _move_aside(checkpoint: Checkpoint) -> None:
    retention.move_aside(checkpoint.path)


def _nothing() -> None:
    pass


def _none() -> None:
    return None


def _refuse(checkpoint: Checkpoint, config: Config, checkpoints: Path, problems: list[str]) -> None:
    """Raise UserError if the run must not continue with this checkpoint or an older one."""
    if not problems:
        if refusals := resume.find_problems(checkpoint, config):
            raise UserError("; ".join(refusals))
    elif checkpoint.path.parent != checkpoints:
        raise UserError(f"resume={config.resume} is broken: {'; '.join(problems)}")


def restore(checkpoint: Checkpoint, train_state: TrainState, force: bool) -> Progress:
    """Restore weights, optimizer, learning-rate schedule and random states. Collective.

    Raises UserError for a checkpoint of other training rows, unless `force`, and for one whose
    optimizer state does not fit.
    """
    trainer = _read_trainer(checkpoint)
    _refuse_other_training(checkpoint, trainer, train_state, force)
    state = train_state.strategy.state()
    if state.has_blockwise_moments and trainer["shards"] != state.num_shards:
        raise UserError(_describe_other_blocks(checkpoint, trainer["shards"], state.num_shards))
    if checkpoint.adapter is not None:
        _fill(state.weights, train_state.method.read(train_state.model, checkpoint.adapter))
        moments = {f"{m}/{n}": s for m, each in state.moments.items() for n, s in each.items()}
        saved = read_tensors(checkpoint.moments)  # of earlier versions: towers' adapters, too
        _fill(moments, {n: t for n, t in saved.items() if n.partition("/")[2] in state.weights})
    else:
        tree: dcp.Tree = {"model": {**state.weights, **state.buffers}}
        if checkpoint.optimizer is None:
            tree["optimizer"] = state.moments
        else:
            dcp.read(state.moments, checkpoint.optimizer)
        dcp.read(tree, checkpoint.path / MODEL)
    with _damage(checkpoint.trainer):
        for name, counts in state.step_counts.items():
            for key, value in counts.items():
                value.fill_(trainer["counts"][name][key])
        if train_state.strategy.loss_scale is not None:
            train_state.strategy.loss_scale.load_state(trainer["loss_scale"])
    train_state.strategy.sync_working_copies()
    with _damage(checkpoint.trainer):
        train_state.scheduler.load_state(trainer["schedule"])
        train_state.early_stopping.load_state(trainer["evaluations"])
        train_state.spikes.load_state(trainer.get("spikes") or {})
    rank_info = train_state.rank_info
    if trainer["ranks"] == rank_info.world_size:
        _restore_random_states(checkpoint, rank_info)
    else:  # the saved random states belong to other ranks: start new streams
        torch.manual_seed(trainer["step"] * rank_info.world_size + rank_info.rank)
    close_files()  # retention will delete this checkpoint
    return Progress(trainer["step"], trainer["tokens"])


def describe_frozen_since(checkpoint: Checkpoint, train_state: TrainState) -> str | None:
    """A log line if an earlier version also trained the modules that text does not reach: their
    weights in the checkpoint, which weight decay alone has changed, are not read."""
    is_partial = train_state.method.is_partial and checkpoint.adapter is None
    if not is_partial or _read_trainer(checkpoint).get("partial", True):
        return None
    return (
        f"{checkpoint.path.name} is of a version that gave vision and audio towers to the "
        "optimizer; text does not reach them, so they are frozen with the base's weights"
    )


def _restore_random_states(checkpoint: Checkpoint, rank_info: RankInfo) -> None:
    rank, file = rank_info.rank, checkpoint.rng
    old = checkpoint.old_rng(rank)
    with _damage(old if old.is_file() else file):
        states = read_tensors(old) if old.is_file() else rng.of_rank(read_tensors(file), rank)
        rng.restore(states, rank_info.device)


def _read_trainer(checkpoint: Checkpoint) -> dict[str, Any]:
    """trainer.json, with all keys that every version writes."""
    trainer = read_object(checkpoint.trainer)
    check_fields(checkpoint.trainer, trainer, TRAINER_FIELDS)
    needed = ("step", "tokens", "ranks", "schedule", "data", "counts")
    if missing := [key for key in needed if trainer.get(key) is None]:
        raise UserError(f"{checkpoint.trainer} is damaged: it has no {', '.join(missing)}")
    return trainer


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Name the file whose content has another form than Shardway writes: its checksum is right, but
    not what it says."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error!s:.200}") from error


def _refuse_other_training(
    checkpoint: Checkpoint, trainer: dict[str, Any], train_state: TrainState, force: bool
) -> None:
    """Raise UserError if `trainer` (trainer.json) is too old, or is of other training rows."""
    if "evaluations" not in trainer:
        raise UserError(
            f"{checkpoint.path} was written by an older version of Shardway, which saved less of "
            "the schedule; resume with that version, or start from scratch with its weights"
        )
    if trainer["data"] != train_state.origin["data"] and not force:
        raise UserError(
            f"the rows are not those of {checkpoint.path}: the data file, the tokenizer or its "
            "chat template has changed, or rows longer than data.max_length are no longer cut → "
            "restore it, or data.too_long=cut, or start from scratch without resume "
            "(resume_force=true continues anyway)"
        )


def _find_damage(checkpoint: Checkpoint, rank_info: RankInfo) -> list[str]:
    """The files of a checkpoint that do not match its manifest; each rank reads its share."""

    def check_share() -> list[str]:
        try:
            checkpoint.summary()
            return manifest.problems(checkpoint.manifest, rank_info.rank, rank_info.world_size)
        except UserError as error:
            return [str(error)]

    by_rank: list[list[str]] = [[]] * rank_info.world_size
    dist.all_gather_object(by_rank, on_all_ranks(check_share))
    return sorted({problem for problems in by_rank for problem in problems})


def _describe_other_blocks(checkpoint: Checkpoint, saved: int, now: int) -> str:
    """Why 8-bit moments in blocks of `saved` shards are refused, and two ways out."""
    before = (
        "strategy=ddp (or single)"
        if saved == 1
        else f"strategy=fsdp on {saved} ranks, or strategy=hsdp strategy.shard_size={saved}"
    )
    return (
        f"the 8-bit optimizer state of {checkpoint.path} is quantized in blocks of {saved} "
        f"shard(s) per tensor, and this run has {now} → resume with {before}; or begin a new run "
        f"with the weights alone: shardway consolidate {checkpoint.path} --output FOLDER, then "
        "shardway train model.name_or_path=FOLDER …"
    )


@torch.no_grad()
def _fill(shards: dict[str, Shard], full: dict[str, torch.Tensor]) -> None:
    """Copy this rank's range of each full tensor into its shard."""
    if differing := sorted(shards.keys() ^ full.keys()):
        raise UserError(
            f"the checkpoint contains other tensors: {differing[0]} ({len(differing)} differ)"
        )
    for name, shard in shards.items():
        if tuple(full[name].shape) != tuple(shard.shape):
            raise UserError(f"the checkpoint contains {name} with shape {tuple(full[name].shape)}")
        shard.local.copy_(shard.slice_of(full[name]))
