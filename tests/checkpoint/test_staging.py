"""The copies that a thread writes: in memory that is kept, and waited for by that thread alone."""

from __future__ import annotations

import pytest
import torch

from launcher.checkpoint.dcp import Tree
from launcher.checkpoint.staging import Staging
from launcher.distributed.shards import shard_of


def tree(value: float) -> Tree:
    return {"model": {"a": shard_of(torch.full((2, 3), value))}}


def test_memory_is_kept_from_one_save_to_the_next() -> None:
    staging = Staging()
    first = staging.copy(tree(1.0))["model"]["a"]
    assert first.local.tolist() == [1.0] * 6
    assert first.shape == (2, 3)
    second = staging.copy(tree(2.0))["model"]["a"]
    assert second.local.data_ptr() == first.local.data_ptr()
    assert second.local.tolist() == [2.0] * 6
    staging.wait()  # nothing was queued on a GPU


def test_only_the_writer_waits_for_copies_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking, "a thread that spins takes a core from training"

        def record(self) -> None:
            events.append("record")

        def synchronize(self) -> None:
            events.append("synchronize")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    staging = Staging()
    staging.copy(tree(1.0))
    assert events == ["record"]
    staging.wait()
    assert events == ["record", "synchronize"]
