"""Save a checkpoint: write it to a hidden folder, the manifest last, then one process renames it.

The training state is captured at a step boundary. All ranks write, over a separate process group on
CPU.
"""

from __future__ import annotations

import json
import os
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

from launcher.checkpoint import dcp
from launcher.config.schema.training import CheckpointConfig
from launcher.distributed.collectives import on_all_ranks
from launcher.distributed.file_sync import FileSync
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.folders import durable, manifest
from launcher.folders.checkpoint import (
    ADAPTER,
    END_TOKENS,
    MODEL,
    SCHEME,
    Checkpoint,
    checkpoint_name,
)
from launcher.folders.run import RunDir
from launcher.run import retention
from launcher.training import rng
from launcher.training.state import TrainState

# Keys of trainer.json that the manifest repeats.
MANIFEST_KEYS = ("step", "eval_loss", "content", "partial", SCHEME, "base", END_TOKENS)


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, as this rank has it at one step."""

    trainer: dict[str, Any]  # trainer.json
    nbytes: int  # of the tensors of all ranks, approximately
    adapter: dict[str, torch.Tensor] | None  # only on rank 0: "weight/NAME", "exp_avg/NAME"
    shards: dcp.Tree  # without an adapter: folder → tree of Shards
    rng: rng.States


class Saver:
    """Saves the checkpoints of a run, one at a time.

    With `checkpoint.async_save`, a thread of every rank writes while training continues. It writes
    copies in host memory and uses its own process group: its collectives cannot be mixed up with
    those of the training.
    """

    def __init__(
        self,
        train_state: TrainState,
        run: RunDir,
        config: CheckpointConfig,
        shared_disk: bool = True,
    ) -> None:
        self.train_state, self.run, self.config = train_state, run, config
        self.file_sync = FileSync(train_state.rank_info, shared_disk)
        self.rank_info, self.group = train_state.rank_info, train_state.group
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.async_save else None
        self._running: Future[None] | None = None
        self._staging = dcp.Staging()
        # As it is now: a file that is damaged later would be in every checkpoint.
        self._frozen_config = run.config.read_bytes() if self.rank_info.is_main else b""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        """Write `checkpoints/step-N`, or start to write it in the background. Collective.

        Raises UserError with the cause on all ranks if this save, or the previous one, fails on any
        rank.
        """
        self.finish()
        snapshot = self._capture(step, tokens, eval_loss)
        if self._thread is None:
            self._write(snapshot)
        else:
            staged = replace(snapshot, shards=self._staging.copy(snapshot.shards))
            self._running = self._thread.submit(self._write, staged)

    def failed(self) -> bool:
        """Whether the save in the background has ended with an error."""
        save = self._running
        return save is not None and save.done() and save.exception() is not None

    def finish(self) -> None:
        """Wait for the save in the background. Raises its UserError."""
        save, self._running = self._running, None
        if save is not None:
            save.result()

    def check_space(self) -> None:
        """Raise UserError if the first checkpoint would not fit on the disk. Collective."""
        weights = self.train_state.strategy.weights()
        tensors = 3 if self.config.content == "all" else 1  # a weight, and usually two moments
        needed = tensors * sum(shard.nbytes for shard in weights.values())
        on_all_ranks(lambda: self._refuse_without_space(needed), self.group)

    def _capture(self, step: int, tokens: int, eval_loss: float | None) -> Snapshot:
        train_state = self.train_state
        state = train_state.strategy.state()
        resumable = self.config.content == "all"
        trainer = {
            "step": step,
            "tokens": tokens,
            "schedule": train_state.scheduler.state(),
            "evaluations": train_state.early_stopping.state(),
            "eval_loss": eval_loss,
            "content": self.config.content,
            "partial": train_state.method.is_partial,
            SCHEME: train_state.method.quantization_scheme,
            END_TOKENS: train_state.end_tokens,
            **train_state.origin,
        }
        if train_state.strategy.loss_scale is not None:
            trainer["loss_scale"] = train_state.strategy.loss_scale.state()
        moments = state.moments if resumable else {}
        if resumable:
            trainer["counts"] = _to_numbers(state.step_counts)
            trainer["shards"] = state.num_shards
        nbytes = sum(shard.nbytes for shard in _leaves({"w": state.weights, **moments}))
        adapter: dict[str, torch.Tensor] | None = None
        shards: dcp.Tree = {}
        if train_state.method.is_adapter:
            # One message per dtype: weights and moments are fp32, quantized moments are not.
            groups = {"weight": state.weights, **moments}
            adapter = train_state.strategy.gather(
                {f"{group}/{name}": s for group, part in groups.items() for name, s in part.items()}
            )
        else:
            shards[MODEL] = {"model": {**state.weights, **state.buffers}}
            if resumable:
                shards["optimizer"] = moments
        return Snapshot(trainer, nbytes, adapter, shards, rng.capture(self.rank_info.device))

    def _write(self, snapshot: Snapshot) -> None:
        """Collective over `self.group`."""
        final = self.run.checkpoints / checkpoint_name(snapshot.trainer["step"])
        partial_folder = Checkpoint(self.run.checkpoints / f".{final.name}.partial")
        on_all_ranks(
            lambda: self._create_folder(final, partial_folder, snapshot.nbytes), self.group
        )
        for name, tree in snapshot.shards.items():
            write = partial(dcp.write, tree, partial_folder.path / name, self.group)
            on_all_ranks(write, self.group)
        own_files = on_all_ranks(
            lambda: self._write_rank_files(snapshot, partial_folder), self.group
        )
        on_all_ranks(lambda: self.file_sync.gather(partial_folder.path, self.group), self.group)
        files: list[manifest.Entries] = [{}] * self.rank_info.world_size
        dist.all_gather_object(files, own_files, group=self.group)
        on_all_ranks(lambda: self._commit(snapshot, partial_folder, final, files), self.group)

    def _create_folder(self, final: Path, partial_folder: Checkpoint, nbytes: int) -> None:
        if self.rank_info.is_main:
            self._refuse_if_outdated()  # the newer attempt may write a folder of this name
            if Checkpoint(final).is_finished:
                raise UserError(f"{final} exists; checkpoints are never overwritten")
            _make_room(final)
            _make_room(partial_folder.path)
            self._refuse_without_space(nbytes)
        if self.rank_info.is_main or self.file_sync.is_node_leader:
            partial_folder.rng(0).parent.mkdir(parents=True)

    def _refuse_without_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.run.checkpoints).free
        if self.rank_info.is_main and free < nbytes * 1.01:
            raise UserError(
                f"a checkpoint of {nbytes / 1e6:,.1f} MB does not fit on the disk of "
                f"{self.run.checkpoints}, which has {free / 1e6:,.1f} MB free; free some space, or "
                "choose checkpoint.keep_last=2, checkpoint.content=weights or another run_dir"
            )

    def _write_rank_files(self, snapshot: Snapshot, folder: Checkpoint) -> manifest.Entries:
        """Write this rank's files. Returns the manifest entries of all files that it has written,
        DCP's included."""
        if self.config.content == "all":
            folder.rng(self.rank_info.rank).write_bytes(save(snapshot.rng))
        if self.rank_info.is_main:
            folder.trainer.write_text(json.dumps(snapshot.trainer, indent=1) + "\n")
            folder.config.write_bytes(self._frozen_config)
            for name, content in self.train_state.tokenizer_files.items():
                (folder.path / name).write_bytes(content)
        if snapshot.adapter is not None:
            weights = _select_group(snapshot.adapter, "weight")
            self.train_state.method.write(self.train_state.model, weights, folder.path / ADAPTER)
            if self.config.content == "all":
                moments = {k: t for k, t in snapshot.adapter.items() if not k.startswith("weight/")}
                folder.moments.write_bytes(save(moments))
        written = manifest.entries(
            folder.path, lambda path: _writer_rank(path) == self.rank_info.rank
        )
        for name in written:
            durable.sync(folder.path / name)
        return written

    def _commit(
        self, snapshot: Snapshot, folder: Checkpoint, final: Path, files: list[manifest.Entries]
    ) -> None:
        """Write the manifest and rename the folder to its final name, on rank 0."""
        if not self.rank_info.is_main:
            return
        content = {key: snapshot.trainer[key] for key in MANIFEST_KEYS}
        all_files = {name: entry for entries in files for name, entry in entries.items()}
        manifest.write(folder.manifest, content, all_files)
        with self.run.lock():
            self._refuse_if_outdated()
            durable.replace(folder.path, final)
            if self.config.keep_last is not None:
                retention.delete_old_checkpoints(self.run.checkpoints, self.config.keep_last)

    def _refuse_if_outdated(self) -> None:
        """A node that Slurm has given up may still be running. Its attempt is over once another
        has started."""
        newest = self.run.newest_attempt().attempt
        if newest > self.run.attempt:
            raise UserError(
                f"attempt {newest} of {self.run.path} has started: attempt {self.run.attempt} can "
                "no longer save"
            )


def _make_room(path: Path) -> None:
    """Rename what has the name of the folder that will be written."""
    if os.path.lexists(path):
        print(f"{path} is not a checkpoint; renamed to {retention.move_aside(path).name}")


def _to_numbers(counts: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    return {name: {k: float(v) for k, v in each.items()} for name, each in counts.items()}


def _select_group(tensors: dict[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    """The tensors named "GROUP/NAME", by NAME."""
    prefix = f"{group}/"
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _leaves(tree: dcp.Tree) -> list[Shard]:
    return [leaf for v in tree.values() for leaf in (_leaves(v) if isinstance(v, dict) else [v])]


def _writer_rank(path: Path) -> int:
    """The rank that wrote a file. File names of DCP and of the random states contain it; rank 0
    wrote all others."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp|rank-(\d+)\.safetensors", path.name)
    return int(match[1] or match[2]) if match else 0
