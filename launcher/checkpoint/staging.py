"""Copies of shards in host memory, which a thread writes while training changes the shards."""

from __future__ import annotations

from dataclasses import replace

import torch

from launcher.checkpoint.dcp import Tree
from launcher.distributed.shards import Shard


class Staging:
    """Host memory for the shards of one save, pinned for those on a GPU. It is reused by the next
    save: only one save may be in progress."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, tree: Tree) -> Tree:
        """A copy of `tree` as it is now.

        Copies from a GPU are queued in its stream, before the next step: nobody waits for them but
        the reader of the copy (`wait`).
        """
        self._copied = None
        copied = {name: self._copy(value, name) for name, value in tree.items()}
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait until the last copy is complete, in the thread that reads it."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, value: Shard | Tree, name: str) -> Shard | Tree:
        if isinstance(value, dict):
            return {key: self._copy(each, f"{name}/{key}") for key, each in value.items()}
        local, buffer = value.local, self._buffers.get(name)
        if buffer is None:
            buffer = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self._buffers[name] = buffer
        return replace(value, local=buffer.copy_(local, non_blocking=True))
