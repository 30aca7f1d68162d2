"""The counts of a step travel while the step before it computes, and all ranks end together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.training.agreement import AgreedSteps
from launcher.training.throughput import Work


class Wire:
    """A sum over this rank and one with the same counts; records what happens in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def load(self, step: int) -> Any:
        self.events.append(f"load {step}")
        return SimpleNamespace(counts=[torch.tensor(step + each) for each in range(5)], step=step)

    def start_sum(self, values: torch.Tensor) -> Any:
        step = int(values[0])
        self.events.append(f"send {step}")

        def wait() -> torch.Tensor:
            self.events.append(f"receive {step}")
            return values * 2

        return wait

    def steps(self, *args: Any, **options: Any) -> AgreedSteps:
        return AgreedSteps(self.load, range(*args), self.start_sum, **options)


def test_the_counts_of_the_next_step_travel_during_a_step() -> None:
    wire, seen = Wire(), []
    for batch, work in wire.steps(3, 6, wants_to_end=lambda: False):
        wire.events.append(f"compute {batch.step}")
        seen.append(work)
    assert wire.events == [
        "load 3", "send 3", "load 4", "send 4", "receive 3", "compute 3",
        "load 5", "send 5", "receive 4", "compute 4", "receive 5", "compute 5",
    ]  # fmt: skip
    assert seen[0] == Work(6, 8, 10, 12, 14)


@pytest.mark.parametrize(("asks", "done"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_a_wish_ends_the_steps_after_the_one_that_computes(asks: int, done: int) -> None:
    """A rank wants to end from its look number `asks` on; a step looks before the one before it."""
    looks = iter(range(100))
    steps = Wire().steps(0, 9, wants_to_end=lambda: next(looks) >= asks)
    assert [batch.step for batch, _ in steps] == list(range(done))
    assert steps.ended


@pytest.mark.parametrize("asks", [0, 1, 3, 8, 9])
def test_no_sum_is_left_under_way(asks: int) -> None:
    """A rank that leaves while others still send it counts would break their connections."""
    wire, looks = Wire(), iter(range(100))
    assert len(list(wire.steps(0, 9, wants_to_end=lambda: next(looks) >= asks))) == asks
    sent = [event.split()[1] for event in wire.events if event.startswith("send")]
    assert sent == [event.split()[1] for event in wire.events if event.startswith("receive")]


def test_what_all_ranks_know_ends_the_steps_at_once() -> None:
    steps = Wire().steps(0, 9, wants_to_end=lambda: False)
    for batch, _ in steps:
        steps.ended = batch.step == 4
    assert batch.step == 4
    assert not list(Wire().steps(0, 9, wants_to_end=lambda: False, ended=True))
    assert not list(Wire().steps(9, 9, wants_to_end=lambda: False))
