"""Writing a checkpoint: aside, manifest last, then one rename by one process.

What is learnt is taken at a step boundary and written by all ranks together, over a process group
of their own on CPU.
"""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save

from launcher import manifest
from launcher.checkpoint import retention, rng, sharded
from launcher.checkpoint.layout import ADAPTER, MODEL, Checkpoint, folder_name
from launcher.checkpoint.learner import Learner
from launcher.config.training import CheckpointConfig
from launcher.distributed.mirror import Mirror
from launcher.distributed.shards import Shard
from launcher.distributed.together import together
from launcher.errors import UserError
from launcher.run_dir import RunDir


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, as this rank has it at one step."""

    trainer: dict[str, Any]
    nbytes: int  # of all ranks, about
    adapter: dict[str, torch.Tensor] | None  # rank 0 of an adapter: "weight/NAME", "exp_avg/NAME"
    shards: sharded.Tree  # else: folder → tree of Shards
    rng: rng.States


class Saver:
    """Saves the checkpoints of a run, one at a time.

    With `checkpoint.async_save` a thread of every rank writes while training goes on, from copies
    in host memory and over the learner's own process group: a collective of the thread never meets
    one of the training.
    """

    def __init__(
        self, learner: Learner, run: RunDir, config: CheckpointConfig, shared_disk: bool = True
    ) -> None:
        self.learner, self.run, self.config = learner, run, config
        self.mirror = Mirror(learner.place, shared_disk)
        self.place, self.group = learner.place, learner.group
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.async_save else None
        self._under_way: Future[None] | None = None
        self._staging = sharded.Staging()

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        """Write `checkpoints/step-N`, or begin to. Collective. Raises UserError on all ranks with
        the cause when it, or the save before it, fails on one."""
        self.finish()
        snapshot = self._snapshot(step, tokens, eval_loss)
        if self._thread is None:
            self._write(snapshot)
        else:
            staged = replace(snapshot, shards=self._staging.copies(snapshot.shards))
            self._under_way = self._thread.submit(self._write, staged)

    def failed(self) -> bool:
        save = self._under_way
        return save is not None and save.done() and save.exception() is not None

    def finish(self) -> None:
        """Wait for the save in the background. Raises its UserError."""
        save, self._under_way = self._under_way, None
        if save is not None:
            save.result()

    def check_space(self) -> None:
        """Refuse a run whose first checkpoint would not fit. Collective."""
        weights = self.learner.strategy.weights()
        moments = 3 if self.config.content == "all" else 1  # the usual two moments of each weight
        needed = moments * sum(shard.nbytes for shard in weights.values())
        together(lambda: self._refuse_without_space(needed), self.group)

    def _snapshot(self, step: int, tokens: int, eval_loss: float | None) -> Snapshot:
        learner = self.learner
        state = learner.strategy.state()
        resumable = self.config.content == "all"
        trainer = {
            "step": step,
            "tokens": tokens,
            "schedule": learner.scheduler.state(),
            "evaluations": learner.watch.state(),
            "eval_loss": eval_loss,
            "content": self.config.content,
            "partial": learner.method.partial,
            "quantisation": learner.method.scheme,
            **learner.about,
        }
        if learner.strategy.loss_scale is not None:
            trainer["loss_scale"] = learner.strategy.loss_scale.state()
        moments = state.moments if resumable else {}
        if resumable:
            trainer["counts"] = _numbers(state.counts)
            trainer["shards"] = state.shards
        nbytes = sum(shard.nbytes for shard in _leaves({"w": state.weights, **moments}))
        adapter: dict[str, torch.Tensor] | None = None
        shards: sharded.Tree = {}
        if learner.method.adapter:
            # One message a dtype: weights and moments are masters' fp32, quantised moments not.
            named = {"weight": state.weights, **moments}
            adapter = learner.strategy.gather(
                {f"{what}/{name}": s for what, part in named.items() for name, s in part.items()}
            )
        else:
            shards[MODEL] = {"model": {**state.weights, **state.buffers}}
            if resumable:
                shards["optimizer"] = moments
        return Snapshot(trainer, nbytes, adapter, shards, rng.capture(self.place.device))

    def _write(self, snapshot: Snapshot) -> None:
        """Collective over `self.group`."""
        final = self.run.checkpoints / folder_name(snapshot.trainer["step"])
        aside = Checkpoint(self.run.checkpoints / f".{final.name}.partial")
        together(lambda: self._begin(final, aside, snapshot.nbytes), self.group)
        for name, tree in snapshot.shards.items():
            write = partial(sharded.write, tree, aside.path / name, self.group)
            together(write, self.group)
        mine = together(lambda: self._write_own(snapshot, aside), self.group)
        together(lambda: self.mirror.collect(aside.path, self.group), self.group)
        files: list[manifest.Entries] = [{}] * self.place.world_size
        dist.all_gather_object(files, mine, group=self.group)
        together(lambda: self._commit(snapshot, aside, final, files), self.group)

    def _begin(self, final: Path, aside: Checkpoint, nbytes: int) -> None:
        if self.place.is_main:
            if final.exists():
                raise UserError(f"{final} exists; a checkpoint is never written over")
            self._refuse_without_space(nbytes)
        if self.place.is_main or self.mirror.leads:
            aside.rng(0).parent.mkdir(parents=True)

    def _refuse_without_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.run.checkpoints).free
        if self.place.is_main and free < nbytes * 1.01:
            raise UserError(
                f"a checkpoint of {nbytes / 1e6:,.1f} MB does not fit on the disk of "
                f"{self.run.checkpoints}, which has {free / 1e6:,.1f} MB free; make room, choose "
                "checkpoint.keep_last=2, checkpoint.content=weights or another run_dir"
            )

    def _write_own(self, snapshot: Snapshot, aside: Checkpoint) -> manifest.Entries:
        """Write this rank's files; the entries of all files that this rank has written."""
        if self.config.content == "all":
            aside.rng(self.place.rank).write_bytes(save(snapshot.rng))
        if self.place.is_main:
            aside.trainer.write_text(json.dumps(snapshot.trainer, indent=1) + "\n")
            shutil.copyfile(self.run.config, aside.config)
            if self.learner.tokenizer is not None:
                self.learner.tokenizer.save_pretrained(aside.path)
        if snapshot.adapter is not None:
            weights = _part(snapshot.adapter, "weight")
            self.learner.method.write(self.learner.model, weights, aside.path / ADAPTER)
            if self.config.content == "all":
                moments = {k: t for k, t in snapshot.adapter.items() if not k.startswith("weight/")}
                aside.moments.write_bytes(save(moments))
        return manifest.entries(aside.path, lambda path: _writer_of(path) == self.place.rank)

    def _commit(
        self, snapshot: Snapshot, aside: Checkpoint, final: Path, files: list[manifest.Entries]
    ) -> None:
        if not self.place.is_main:
            return
        told = ("step", "eval_loss", "content", "partial", "quantisation", "base")
        what = {key: snapshot.trainer[key] for key in told}
        merged = {name: entry for each in files for name, entry in each.items()}
        manifest.write(aside.manifest, what, merged)
        with self.run.lock():
            self._refuse_when_outdated()
            aside.path.rename(final)
            if self.config.keep_last is not None:
                retention.prune(self.run.checkpoints, self.config.keep_last)

    def _refuse_when_outdated(self) -> None:
        """A node that was given up may still be alive: its attempt is over once another began."""
        newest = self.run.newest().attempt
        if newest > self.run.attempt:
            raise UserError(
                f"attempt {newest} of {self.run.path} has begun: attempt {self.run.attempt} keeps "
                "nothing that it learnt since"
            )


def _numbers(counts: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    return {name: {k: float(v) for k, v in each.items()} for name, each in counts.items()}


def _part(tensors: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    prefix = f"{what}/"
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _leaves(tree: sharded.Tree) -> list[Shard]:
    return [leaf for v in tree.values() for leaf in (_leaves(v) if isinstance(v, dict) else [v])]


def _writer_of(path: Path) -> int:
    """The rank that wrote a file: DCP and the random states name it."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp|rank-(\d+)\.safetensors", path.name)
    return int(match[1] or match[2]) if match else 0
