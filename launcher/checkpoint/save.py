"""Save a checkpoint: write it to a hidden folder, the manifest last, then one process renames it.

The training state is captured at a step boundary. All ranks write, each one file; what is small is
gathered on the CPU of rank 0.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save

from launcher.checkpoint import dcp
from launcher.checkpoint.dcp import Tree
from launcher.checkpoint.dcp_writer import DcpWriter
from launcher.checkpoint.staging import Staging
from launcher.config.schema.training import CheckpointConfig, LaunchConfig
from launcher.distributed.collectives import on_all_ranks
from launcher.distributed.file_sync import FileSync
from launcher.distributed.gather import gather_to_main
from launcher.errors import UserError
from launcher.folders import durable, manifest
from launcher.folders.checkpoint import (
    ADAPTER,
    END_TOKENS,
    MODEL,
    SCHEME,
    TRAINED_CLASS,
    Checkpoint,
    checkpoint_name,
)
from launcher.folders.run import RunDir
from launcher.io.current_device import use_device
from launcher.run import heartbeat, retention
from launcher.run.heartbeat import Phase
from launcher.training import rng
from launcher.training.state import TrainState

# Keys of trainer.json that the manifest repeats.
MANIFEST_KEYS = (
    *("step", "eval_loss", "content", "partial", SCHEME, "base", TRAINED_CLASS, END_TOKENS),
)


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, as this rank has it at one step."""

    trainer: dict[str, Any]  # trainer.json
    nbytes: int  # of the tensors of all ranks, approximately
    shards: Tree  # of an adapter: weight, exp_avg, … → name; otherwise model, optimizer → …
    rng: rng.States


@dataclass(frozen=True)
class Gathered:
    """What rank 0 writes for all ranks."""

    adapter: dict[str, torch.Tensor] | None  # "weight/NAME", "exp_avg/NAME"; None: no adapter
    rng: list[bytes]  # of every rank; []: the checkpoint has none


class Saver:
    """Saves the checkpoints of a run, one at a time.

    With `checkpoint.async_save`, a thread of every rank writes while training continues. It writes
    copies in host memory and uses its own process group: its collectives cannot be mixed up with
    those of the training. Otherwise no such group is made: it connects every rank with every other.
    """

    def __init__(
        self,
        train_state: TrainState,
        run: RunDir,
        config: CheckpointConfig,
        launch: LaunchConfig,
    ) -> None:
        """Collective: makes the process group of the thread."""
        self.train_state, self.run, self.config = train_state, run, config
        self.rank_info = train_state.rank_info
        self.file_sync = FileSync(self.rank_info, launch.shared_disk)
        self.group: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        if config.async_save:
            timeout = timedelta(minutes=launch.collective_minutes)  # torch's default is another
            self.group = dist.new_group(backend="gloo", timeout=timeout)
            device = (self.rank_info.device,)
            self._thread = ThreadPoolExecutor(1, "checkpoint", use_device, device)
        self._running: Future[None] | None = None
        self._staging = Staging()
        self._dcp_writer = DcpWriter(self.group)
        # As it is now: a file that is damaged later would be in every checkpoint.
        self._frozen_config = run.config.read_bytes() if self.rank_info.is_main else b""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        """Write `checkpoints/step-N`, or start to write it in the background. Collective.

        Raises UserError with the cause on all ranks if this save, or the previous one, fails on any
        rank.
        """
        heartbeat.enter(Phase.SAVE, step)
        self.finish()
        snapshot = self._capture(step, tokens, eval_loss)
        if self._thread is None:
            self._write(snapshot)
        else:
            staged = replace(snapshot, shards=self._staging.copy(snapshot.shards))
            self._running = self._thread.submit(self._write_staged, staged)

    def failed(self) -> bool:
        """Whether the save in the background has ended with an error."""
        save = self._running
        return save is not None and save.done() and save.exception() is not None

    def finish(self) -> None:
        """Wait for the save in the background. Raises its UserError."""
        save, self._running = self._running, None
        if save is not None:
            heartbeat.enter(Phase.SAVE)
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
            "spikes": train_state.spikes.state(),
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
        shards: Tree
        if train_state.method.is_adapter:
            shards = {"weight": state.weights, **moments}
        else:
            shards = {"model": {**state.weights, **state.buffers}}
            if resumable:
                shards["optimizer"] = moments
        nbytes = sum(shard.nbytes for _, shard in dcp.leaves(shards))
        return Snapshot(trainer, nbytes, shards, rng.capture(self.rank_info.device))

    def _write_staged(self, snapshot: Snapshot) -> None:
        self._staging.wait()
        self._write(snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        """Collective over `self.group`."""
        final = self.run.checkpoints / checkpoint_name(snapshot.trainer["step"])
        partial_folder = Checkpoint(self.run.checkpoints / f".{final.name}.partial")
        on_all_ranks(
            lambda: self._create_folder(final, partial_folder, snapshot.nbytes), self.group
        )
        gathered = self._gather(snapshot)
        if not self.train_state.method.is_adapter:
            self._dcp_writer.write(snapshot.shards, partial_folder.path / MODEL)
        own_files = on_all_ranks(
            lambda: self._write_rank_files(snapshot, gathered, partial_folder), self.group
        )
        on_all_ranks(lambda: self.file_sync.gather(partial_folder.path, self.group), self.group)
        files: list[manifest.Entries] = [{}] * self.rank_info.world_size
        dist.all_gather_object(files, own_files, group=self.group)
        on_all_ranks(lambda: self._commit(snapshot, partial_folder, final, files), self.group)

    def _gather(self, snapshot: Snapshot) -> Gathered:
        """What rank 0 writes; other ranks have nothing in it. Collective over `self.group`."""
        adapter = None
        if self.train_state.method.is_adapter:
            flat = {"/".join(path): shard for path, shard in dcp.leaves(snapshot.shards)}
            adapter = gather_to_main(flat, self.group)
        if self.config.content != "all":
            return Gathered(adapter, [])
        states = [b""] * self.rank_info.world_size if self.rank_info.is_main else None
        dist.gather_object(save(snapshot.rng), states, group=self.group, group_dst=0)
        return Gathered(adapter, states or [])

    def _create_folder(self, final: Path, partial_folder: Checkpoint, nbytes: int) -> None:
        if self.rank_info.is_main:
            self._refuse_if_outdated()  # the newer attempt may write a folder of this name
            if Checkpoint(final).is_finished:
                raise UserError(f"{final} exists; checkpoints are never overwritten")
            _make_room(final)
            _make_room(partial_folder.path)
            self._refuse_without_space(nbytes)
        if self.rank_info.is_main or self.file_sync.is_node_leader:
            is_adapter = self.train_state.method.is_adapter
            folder = partial_folder.path if is_adapter else partial_folder.path / MODEL
            folder.mkdir(parents=True)

    def _refuse_without_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.run.checkpoints).free
        if self.rank_info.is_main and free < nbytes * 1.01:
            raise UserError(
                f"a checkpoint of {nbytes / 1e6:,.1f} MB does not fit on the disk of "
                f"{self.run.checkpoints}, which has {free / 1e6:,.1f} MB free; free some space, or "
                "choose checkpoint.keep_last=2, checkpoint.content=weights or another run_dir"
            )

    def _write_rank_files(
        self, snapshot: Snapshot, gathered: Gathered, folder: Checkpoint
    ) -> manifest.Entries:
        """Write this rank's files. Returns the manifest entries of all files that it has written,
        DCP's included."""
        if gathered.rng:
            folder.rng.write_bytes(save(rng.join(gathered.rng)))
        if self.rank_info.is_main:
            folder.trainer.write_text(json.dumps(snapshot.trainer, indent=1) + "\n")
            folder.config.write_bytes(self._frozen_config)
            for name, content in self.train_state.tokenizer_files.items():
                (folder.path / name).write_bytes(content)
        if gathered.adapter is not None:
            weights = _select_group(gathered.adapter, "weight")
            self.train_state.method.write(self.train_state.model, weights, folder.path / ADAPTER)
            if self.config.content == "all":
                moments = {k: t for k, t in gathered.adapter.items() if not k.startswith("weight/")}
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
    """The step counts as numbers, which are read from each device at once."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for each in counts.values():
        for count in each.values():
            by_device.setdefault(count.device, []).append(count)
    numbers = {device: iter(torch.stack(each).tolist()) for device, each in by_device.items()}
    return {
        name: {key: float(next(numbers[count.device])) for key, count in each.items()}
        for name, each in counts.items()
    }


def _select_group(tensors: dict[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    """The tensors named "GROUP/NAME", by NAME."""
    prefix = f"{group}/"
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _writer_rank(path: Path) -> int:
    """The rank that wrote a file: the one in a name of DCP. Rank 0 wrote all others."""
    match = re.fullmatch(r"__(\d+)_0\.distcp", path.name)
    return int(match[1]) if match else 0
