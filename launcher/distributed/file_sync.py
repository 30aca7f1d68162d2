"""Copy files between machines that share no disk. Rank 0's run folder has the checkpoints.

The first rank of each other machine sends the files that its machine's ranks have written, and
receives the files that they read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError

CHUNK_BYTES = 1 << 26  # of one message


class FileSync:
    """Copies folders between rank 0 and the first rank of every other machine."""

    def __init__(self, rank_info: RankInfo, shared: bool) -> None:
        """`shared`: all machines see the same folder, and nothing is copied."""
        self._rank = rank_info.rank
        ranks_per_node = rank_info.local_world_size
        node_leaders = range(ranks_per_node, rank_info.world_size, ranks_per_node)
        self._leaders = [] if shared else list(node_leaders)
        # Not on rank 0's machine.
        self.is_remote = not shared and rank_info.rank >= ranks_per_node
        # The rank that sends and receives the files of its machine, which is not rank 0's.
        self.is_node_leader = rank_info.rank in self._leaders

    def gather(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Move the files in every other machine's `folder` to rank 0's `folder`; the paths may
        differ. Collective. Raises UserError if rank 0 cannot write them."""
        for leader in self._leaders:
            if self._rank == leader:
                _send(folder, 0, group)
                shutil.rmtree(folder)
            elif self._rank == 0:
                _receive(folder, leader, group)

    def broadcast(self, folder: Path, seal: str, group: dist.ProcessGroup | None = None) -> None:
        """Copy all of rank 0's `folder` to every other machine, except where the folder exists with
        the same content of the file `seal`.

        Collective. Raises UserError if the files cannot be written, or if a machine has a folder
        with other content.
        """
        for leader in self._leaders:
            if self._rank == leader:
                _send_object(_read_bytes(folder / seal), 0, group)
                answer = _receive_object(0, group)
                if answer == "take":
                    partial = folder.with_name(f".{folder.name}.partial")
                    _receive(partial, 0, group)
                    partial.rename(folder)
                elif answer == "other":
                    raise UserError(f"{folder} differs from rank 0's; move or delete it")
            elif self._rank == 0:
                remote_seal = _receive_object(leader, group)
                same = remote_seal == _read_bytes(folder / seal)
                answer = "take" if remote_seal is None else "same" if same else "other"
                _send_object(answer, leader, group)
                if answer == "take":
                    _send(folder, leader, group)


def _read_bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _send_object(value: object, to: int, group: dist.ProcessGroup | None) -> None:
    dist.send_object_list([value], to, group=group)


def _receive_object(source: int, group: dist.ProcessGroup | None) -> Any:
    received: list[Any] = [None]
    dist.recv_object_list(received, source, group=group)
    return received[0]


def _send(folder: Path, to: int, group: dist.ProcessGroup | None) -> None:
    files = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    _send_object(files, to, group)
    for name, size in files.items():
        with (folder / name).open("rb") as file:
            for chunk in _chunks(size):
                file.readinto(chunk.numpy().data)
                dist.send(chunk, to, group=group)


def _receive(folder: Path, source: int, group: dist.ProcessGroup | None) -> None:
    """Receives everything even if the disk is full: the sender does not notice."""
    sizes: dict[str, int] = _receive_object(source, group)
    problem: OSError | None = None
    for name, size in sizes.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
        except OSError as error:
            problem = error
        for chunk in _chunks(size):
            dist.recv(chunk, source, group=group)
            if problem is None:
                try:
                    with path.open("ab") as file:
                        file.write(chunk.numpy().data)
                except OSError as error:
                    problem = error
    if problem is not None:
        raise UserError(f"the files of rank {source} cannot be written to {folder}: {problem}")


def _chunks(size: int) -> Iterator[torch.Tensor]:
    """Uninitialized byte tensors whose sizes add up to `size`."""
    for start in range(0, size, CHUNK_BYTES):
        yield torch.empty(min(CHUNK_BYTES, size - start), dtype=torch.uint8)
