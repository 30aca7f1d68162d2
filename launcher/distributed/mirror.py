"""Files between machines that share no disk: rank 0's run folder has the checkpoints.

What the ranks of another machine write goes to it, and what they read comes from it, by the first
rank of each machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.distributed.process_group import Place
from launcher.errors import UserError

CHUNK = 1 << 26  # bytes of one message


class Mirror:
    def __init__(self, place: Place, shared: bool) -> None:
        """`shared`: all machines see one folder, and there is nothing to do."""
        self._rank = place.rank
        every = place.local_world_size
        self._leaders = [] if shared else list(range(every, place.world_size, every))
        self.away = not shared and place.rank >= every  # not on rank 0's machine
        self.leads = place.rank in self._leaders  # stands for its machine

    def collect(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Move the files of every other machine's `folder` into rank 0's, which is called as
        theirs or otherwise. Collective. Raises UserError when they cannot be written."""
        for leader in self._leaders:
            if self._rank == leader:
                _send(folder, 0, group)
                shutil.rmtree(folder)
            elif self._rank == 0:
                _receive(folder, leader, group)

    def deliver(self, folder: Path, seal: str, group: dist.ProcessGroup | None = None) -> None:
        """Copy rank 0's `folder` to every other machine that has no folder with the same file
        `seal`. Collective. Raises UserError where it cannot be written, or another is there."""
        for leader in self._leaders:
            told: list[Any] = [_bytes(folder / seal)]
            if self._rank == leader:
                dist.send_object_list(told, 0, group=group)
                answer: list[Any] = [None]
                dist.recv_object_list(answer, 0, group=group)
                if answer[0] == "take":
                    aside = folder.with_name(f".{folder.name}.partial")
                    _receive(aside, 0, group)
                    aside.rename(folder)
                elif answer[0] == "other":
                    raise UserError(f"{folder} is not the one of rank 0; move it out of the way")
            elif self._rank == 0:
                theirs: list[Any] = [None]
                dist.recv_object_list(theirs, leader, group=group)
                same = theirs == told
                word = "take" if theirs[0] is None else "same" if same else "other"
                dist.send_object_list([word], leader, group=group)
                if word == "take":
                    _send(folder, leader, group)


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _send(folder: Path, to: int, group: dist.ProcessGroup | None) -> None:
    files = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    dist.send_object_list([files], to, group=group)
    for name, size in files.items():
        with (folder / name).open("rb") as file:
            for chunk in _chunks(size):
                file.readinto(chunk.numpy().data)
                dist.send(chunk, to, group=group)


def _receive(folder: Path, source: int, group: dist.ProcessGroup | None) -> None:
    """To the end, even when the disk is full: the sender does not know."""
    told: list[Any] = [None]
    dist.recv_object_list(told, source, group=group)
    problem: OSError | None = None
    for name, size in told[0].items():
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
        raise UserError(f"{folder} cannot take rank {source}'s files: {problem}")


def _chunks(size: int) -> Iterator[torch.Tensor]:
    """Empty tensors of bytes that make up `size`."""
    for start in range(0, size, CHUNK):
        yield torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
