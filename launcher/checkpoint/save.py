"""Writing a checkpoint: aside, manifest last, then one rename by one process.

What is learnt is taken at a step boundary and written by all ranks together, over a process group
of their own on CPU.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from launcher import manifest
from launcher.checkpoint import retention, rng, sharded
from launcher.checkpoint.layout import ADAPTER, MODEL, Checkpoint, folder_name
from launcher.config.training import CheckpointConfig
from launcher.distributed.process_group import Place
from launcher.distributed.shards import Shard
from launcher.distributed.together import together
from launcher.errors import UserError
from launcher.method.base import Method
from launcher.run_dir import RunDir
from launcher.strategy import Strategy


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, as this rank has it at one step."""

    trainer: dict[str, Any]
    nbytes: int  # of all ranks, about
    adapter: dict[str, torch.Tensor] | None  # rank 0 of an adapter: "weight/NAME", "exp_avg/NAME"
    shards: dict[str, sharded.Tree]  # else: folder → tree
    rng: rng.States


class Saver:
    """Saves the checkpoints of a run."""

    def __init__(
        self,
        strategy: Strategy,
        method: Method,
        model: nn.Module,
        scheduler: LRScheduler,
        run: RunDir,
        config: CheckpointConfig,
        place: Place,
        about: dict[str, Any],
    ) -> None:
        """`about` goes into every trainer.json and manifest: base model, data, ranks."""
        self.strategy, self.method, self.model, self.scheduler = strategy, method, model, scheduler
        self.run, self.config, self.place, self.about = run, config, place, about
        self.group = dist.new_group(backend="gloo")

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        """Write `checkpoints/step-N`. Collective. Raises UserError on all ranks with the cause
        when it fails on one."""
        self._write(self._snapshot(step, tokens, eval_loss))

    def check_space(self) -> None:
        """Refuse a run whose first checkpoint would not fit. Collective."""
        weights = self.strategy.weights()
        moments = 3 if self.config.content == "all" else 1  # the usual two moments of each weight
        needed = moments * sum(shard.nbytes for shard in weights.values())
        together(lambda: self._refuse_without_space(needed), self.group)

    def _snapshot(self, step: int, tokens: int, eval_loss: float | None) -> Snapshot:
        state = self.strategy.state()
        resumable = self.config.content == "all"
        trainer = {
            "step": step,
            "tokens": tokens,
            "schedule": self.scheduler.last_epoch,
            "eval_loss": eval_loss,
            "content": self.config.content,
            **self.about,
        }
        moments = state.moments if resumable else {}
        if resumable:
            trainer["counts"] = _numbers(state.counts)
        nbytes = sum(shard.nbytes for shard in _leaves({"w": state.weights, **moments}))
        adapter, shards = None, {}
        if self.method.adapter:
            # One message for weights and moments: all are masters' fp32.
            named = {"weight": state.weights, **moments}
            adapter = self.strategy.gather(
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
            together(lambda n=name, t=tree: sharded.write(t, aside.path / n, self.group))  # type: ignore[misc]
        mine = together(lambda: self._write_own(snapshot, aside), self.group)
        files: list[manifest.Entries] = [{}] * self.place.world_size
        dist.all_gather_object(files, mine, group=self.group)
        together(lambda: self._commit(snapshot, aside, final, files), self.group)

    def _begin(self, final: Path, aside: Checkpoint, nbytes: int) -> None:
        if not self.place.is_main:
            return
        if final.exists():
            raise UserError(f"{final} exists; a checkpoint is never written over")
        self._refuse_without_space(nbytes)
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
        if snapshot.adapter is not None:
            parts = {key.partition("/")[0] for key in snapshot.adapter} - {"weight"}
            weights = _part(snapshot.adapter, "weight")
            self.method.write(self.model, weights, aside.path / ADAPTER)
            if parts:
                moments = {k: t for k, t in snapshot.adapter.items() if not k.startswith("weight/")}
                aside.moments.write_bytes(save(moments))
        return manifest.entries(aside.path, lambda path: _writer_of(path) == self.place.rank)

    def _commit(
        self, snapshot: Snapshot, aside: Checkpoint, final: Path, files: list[manifest.Entries]
    ) -> None:
        if not self.place.is_main:
            return
        what = {key: snapshot.trainer[key] for key in ("step", "eval_loss", "content", "base")}
        merged = {name: entry for each in files for name, entry in each.items()}
        manifest.write(aside.manifest, what, merged)
        aside.path.rename(final)
        if self.config.keep_last is not None:
            retention.prune(self.run.checkpoints, self.config.keep_last)


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
