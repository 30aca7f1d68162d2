"""Loss spikes: how one is recognized, and which batches are left out after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from launcher.data.loader import batch_of
from launcher.errors import SpikeError, StepError

MIN_STEPS = 16  # before a loss can be a spike
SIGMA_OF_MAD = 1.4826  # of a normal distribution: its standard deviation by its median deviation
LEAST_SPREAD = 0.02  # of the median: a loss that hardly varies is not one of spikes
MAX_REWINDS = 5  # at one place
REWINDS_OF_SINGLE_BATCHES = 2  # at one place, before the batch ahead of them is suspected, too


@dataclass
class Spikes:
    """The losses of the last steps, and the batches that training leaves out; both are saved in
    checkpoints, and equal on all ranks.

    A loss is a spike if it is above the median of the last `window` losses by more than `threshold`
    times their spread: the median absolute deviation, scaled to a standard deviation.
    """

    policy: str = "ignore"  # training.on_spike
    threshold: float = 10.0
    window: int = 64
    losses: list[float] = field(default_factory=list)  # the newest last
    left_out: list[int] = field(default_factory=list)  # batches, counted from 0 over all epochs
    place: int = 0  # the step of the first rewind of those that are counted
    rewinds: int = 0  # at that place

    def add(self, step: int, loss: float) -> None:
        """Add the finite loss of `step`. Raises SpikeError if it is a spike and training.on_spike
        asks for more than to ignore it."""
        if self.policy != "ignore" and len(self.losses) >= min(MIN_STEPS, self.window):
            middle = median(self.losses)
            deviation = median(abs(each - middle) for each in self.losses)
            spread = max(SIGMA_OF_MAD * deviation, LEAST_SPREAD * abs(middle))
            if loss > middle + self.threshold * spread:
                raise SpikeError(
                    step,
                    f"step {step}: loss {loss:.4f} is a spike, {(loss - middle) / spread:.1f} "
                    f"times the spread of {spread:.4f} above the median {middle:.4f} of the last "
                    f"{len(self.losses)} steps (training.spike_threshold={self.threshold:g}); "
                    "training stops here. Try training.on_spike=rewind, which goes back to a "
                    "checkpoint and leaves the batch out, or inspect the rows of this step",
                )
        self.losses = [*self.losses, loss][-self.window :]

    def blame(self, error: StepError) -> int:
        """Leave out the batches that `error` is blamed on. Returns the first step that they were
        in.

        That is the batch of its step. If leaving batches out has not helped, the update before them
        may have done it: its batch is left out, too. Raises `error` if that has been tried too
        often at one place.
        """
        if not self.rewinds or abs(error.step - self.place) > self.window:
            self.place, self.rewinds = error.step, 0
        if self.rewinds == MAX_REWINDS:
            raise error.with_reason(
                f"Training has gone back {MAX_REWINDS} times near step {self.place} and has left "
                f"out the batches {', '.join(map(str, self.left_out))}"
            )
        self.rewinds += 1
        first = error.step
        blamed = [batch_of(first - 1, self.left_out)]
        if self.rewinds > REWINDS_OF_SINGLE_BATCHES and first > 1:
            first -= 1
            blamed.append(batch_of(first - 1, self.left_out))
        self.left_out = sorted([*self.left_out, *blamed])
        return first

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint saves."""
        kept = ("losses", "left_out", "place", "rewinds")
        return {name: getattr(self, name) for name in kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; {} is that of a version that saved none."""
        self.losses = [float(each) for each in state.get("losses", [])][-self.window :]
        self.left_out = sorted(map(int, state.get("left_out", [])))
        self.place, self.rewinds = int(state.get("place", 0)), int(state.get("rewinds", 0))
