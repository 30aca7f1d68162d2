"""Going on from a checkpoint: which one, and how its content comes back. Collective throughout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launcher import manifest
from launcher.checkpoint import resume, retention, rng, sharded
from launcher.checkpoint.layout import MANIFEST, MODEL, Checkpoint
from launcher.checkpoint.learner import Learner
from launcher.config import Config
from launcher.distributed.mirror import Mirror
from launcher.distributed.process_group import Place
from launcher.distributed.shards import Shard
from launcher.distributed.together import together
from launcher.errors import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """How far training has come."""

    step: int = 0
    tokens: int = 0


def choose(config: Config, checkpoints: Path, place: Place, say: Say) -> Checkpoint | None:
    """The checkpoint to go on from, None to begin; its files are what was written, and are on every
    machine.

    Broken ones of this run are named, set aside and passed over; one that was asked for by its path
    is refused. Raises UserError when the configuration has changed in what is learnt.
    """
    mirror = Mirror(place, config.launch.shared_disk)
    clears = place.is_main or mirror.leads
    together(lambda: retention.clear_leftovers(checkpoints) if clears else None)
    found: list[Any] = [resume.candidates(config.resume, checkpoints) if place.is_main else None]
    dist.broadcast_object_list(found)
    for original in found[0]:
        # Another machine's copy.
        checkpoint = Checkpoint(checkpoints / original.path.name) if mirror.away else original
        together(partial(mirror.deliver, checkpoint.path, MANIFEST))
        wrong = _problems(checkpoint, place)
        refuse = partial(_refuse, original, config, checkpoints, wrong)
        together(lambda refuse=refuse: refuse() if place.is_main else None)  # type: ignore[misc]
        if not wrong:
            return checkpoint
        say(f"{checkpoint.path.name} is broken and passed over: {'; '.join(wrong)}")
        together(lambda c=original: resume.set_aside(c) if place.is_main else None)  # type: ignore[misc]
    return None


def _refuse(checkpoint: Checkpoint, config: Config, checkpoints: Path, wrong: list[str]) -> None:
    """Raise UserError where nothing else may be gone on from."""
    if not wrong:
        if refusals := resume.problems(checkpoint, config):
            raise UserError("; ".join(refusals))
    elif checkpoint.path.parent != checkpoints:
        raise UserError(f"resume={config.resume} is broken: {'; '.join(wrong)}")


def restore(checkpoint: Checkpoint, learner: Learner, force: bool) -> Progress:
    """Bring back weights, optimizer, schedule and random states. Collective. Raises UserError for a
    checkpoint of other data, unless `force`."""
    trainer = json.loads(checkpoint.trainer.read_text())
    if "evaluations" not in trainer:
        raise UserError(
            f"{checkpoint.path} is of an older Shardway, which kept less of the schedule; go on "
            "with that version, or begin anew from its weights"
        )
    if trainer["data"] != learner.about["data"] and not force:
        raise UserError(
            f"the rows are not those of {checkpoint.path}: the data file, the tokenizer or its "
            "chat template has changed; bring it back, or begin anew without resume "
            "(resume_force=true trains on regardless)"
        )
    state = learner.strategy.state()
    if state.blockwise and trainer["shards"] != state.shards:
        raise UserError(
            f"the 8-bit optimizer state of {checkpoint.path} is quantised in blocks of the "
            f"{trainer['shards']} runs that a tensor was cut into, and there are {state.shards} "
            "now; go on with as many ranks under the same strategy (single and ddp cut nothing)"
        )
    if checkpoint.adapter is not None:
        _fill(state.weights, learner.method.read(learner.model, checkpoint.adapter))
        moments = {f"{m}/{n}": s for m, each in state.moments.items() for n, s in each.items()}
        _fill(moments, load_file(checkpoint.moments))
    else:
        model_tree = {"model": {**state.weights, **state.buffers}}
        sharded.read(model_tree, checkpoint.path / MODEL, learner.group)
        sharded.read(state.moments, checkpoint.optimizer, learner.group)
    for name, counts in state.counts.items():
        for key, value in counts.items():
            value.fill_(trainer["counts"][name][key])
    if learner.strategy.loss_scale is not None:
        learner.strategy.loss_scale.load(trainer["loss_scale"])
    learner.strategy.refresh()
    learner.scheduler.go_on_from(trainer["schedule"])
    learner.watch.go_on_from(trainer["evaluations"])
    place = learner.place
    if trainer["ranks"] == place.world_size:
        rng.restore(load_file(checkpoint.rng(place.rank)), place.device)
    else:  # no rank's random states fit: begin new streams
        torch.manual_seed(trainer["step"] * place.world_size + place.rank)
    return Progress(trainer["step"], trainer["tokens"])


def _problems(checkpoint: Checkpoint, place: Place) -> list[str]:
    """What is wrong with a checkpoint's files; every rank reads its share of them."""

    def look() -> list[str]:
        try:
            return manifest.problems(checkpoint.manifest, place.rank, place.world_size)
        except UserError as error:
            return [str(error)]

    found: list[list[str]] = [[]] * place.world_size
    dist.all_gather_object(found, together(look))
    return sorted({problem for each in found for problem in each})


@torch.no_grad()
def _fill(shards: dict[str, Shard], whole: dict[str, torch.Tensor]) -> None:
    """Write this rank's run of each whole tensor."""
    if apart := sorted(shards.keys() ^ whole.keys()):
        raise UserError(f"the checkpoint holds other tensors: {apart[0]} ({len(apart)})")
    for name, shard in shards.items():
        if tuple(whole[name].shape) != tuple(shard.shape):
            raise UserError(f"the checkpoint holds {name} as {tuple(whole[name].shape)}")
        shard.local.copy_(shard.of(whole[name]))
