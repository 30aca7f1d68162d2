"""Which losses are spikes, and which batches are left out."""

from __future__ import annotations

import random

import pytest

from launcher.data.loader import batch_of
from launcher.errors import SpikeError, StepError
from launcher.training.spikes import MAX_REWINDS, Spikes


def filled(policy: str = "stop", **settings: float) -> Spikes:
    """After forty steps with losses around 2, spread 0.1."""
    noise = random.Random(0)
    spikes = Spikes(policy, **settings)  # type: ignore[arg-type]
    for step in range(1, 41):
        spikes.add(step, 2 + noise.gauss(0, 0.1))
    return spikes


@pytest.mark.parametrize("loss", [0.1, 1.0, 2.5])
def test_a_lower_or_slightly_higher_loss_is_no_spike(loss: float) -> None:
    filled().add(41, loss)


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_a_spike_is_named_with_its_measure(policy: str) -> None:
    with pytest.raises(SpikeError, match=r"step 41: loss 4\.0000 is a spike, .* the last 40 steps"):
        filled(policy).add(41, 4.0)
    filled("ignore").add(41, 4.0)


def test_the_threshold_and_the_window_are_those_of_the_settings() -> None:
    filled(threshold=30.0).add(41, 4.0)
    short = filled(window=16)
    assert len(short.losses) == 16
    with pytest.raises(SpikeError):
        filled(threshold=3.0).add(41, 2.5)


def test_neither_the_first_steps_nor_a_loss_that_hardly_varies_makes_spikes() -> None:
    spikes = Spikes("stop")
    for step, loss in enumerate([9.0, 2.0, 8.0, 3.0], start=1):
        spikes.add(step, loss)
    flat = Spikes("stop")
    for step in range(1, 41):
        flat.add(step, 2.0)
    flat.add(41, 2.3)
    with pytest.raises(SpikeError):
        flat.add(42, 2.5)


def test_a_spike_does_not_count_among_the_losses_it_is_compared_with() -> None:
    spikes = filled()
    before = list(spikes.losses)
    with pytest.raises(SpikeError):
        spikes.add(41, 9.0)
    assert spikes.losses == before


def test_steps_take_the_batches_that_are_not_left_out() -> None:
    assert [batch_of(step, [2, 3, 6]) for step in range(6)] == [0, 1, 4, 5, 7, 8]
    assert [batch_of(step, []) for step in range(3)] == [0, 1, 2]


def test_batches_are_blamed_one_by_one_and_then_with_the_one_before_until_it_is_enough() -> None:
    spikes = Spikes("rewind")
    firsts = [spikes.blame(StepError(step, "why")) for step in (8, 8, 8, 7, 6)]
    assert firsts == [8, 8, 7, 6, 5]
    assert spikes.rewinds == MAX_REWINDS
    assert spikes.left_out == [4, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(StepError, match="gone back 5 times near step 8"):
        spikes.blame(StepError(8, "why"))
    assert spikes.blame(StepError(8 + spikes.window + 1, "elsewhere")) == 8 + spikes.window + 1


def test_the_state_is_restored_and_older_checkpoints_have_none() -> None:
    spikes = filled("rewind")
    spikes.blame(StepError(8, "why"))
    again = Spikes("rewind")
    again.load_state(spikes.state())
    assert again == spikes
    again.load_state({})
    assert again == Spikes("rewind")
