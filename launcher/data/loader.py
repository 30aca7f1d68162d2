"""Which rows a step sees, and their batches. Index-based: any step is reached in O(1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from launcher.data.batch import IGNORED, MicroBatch, collate, padded
from launcher.data.dataset import Row
from launcher.data.order import Order
from launcher.data.packing import Sequences, pack


class RowSource(Protocol):
    """Rows by number, stored or made when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Row: ...
    def length(self, row: int) -> int: ...


@dataclass(frozen=True)
class Window:
    """This rank's share of one optimizer step. Counts are 0-d int64 tensors on the CPU."""

    micro_batches: list[MicroBatch]
    target_tokens: torch.Tensor
    tokens: torch.Tensor  # of its rows, without padding
    rows: torch.Tensor  # without those that are padding alone
    positions: torch.Tensor  # with padding
    pairs: torch.Tensor  # of a token and one that it attends to, itself included

    @property
    def counts(self) -> tuple[torch.Tensor, ...]:
        return self.target_tokens, self.tokens, self.rows, self.positions, self.pairs


@dataclass(frozen=True)
class Loader:
    """Deals sequences to ranks. A step's rows depend on the seed and the step, not on the ranks."""

    rows: RowSource
    sequences: Sequences  # what an epoch goes through
    order: Order
    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int
    pad_to_multiple_of: int
    pad_token_id: int
    packed: bool = False
    pack_steps_to: int | None = None  # tokens: the rows of each step are packed when it comes

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left."""
        return -(-len(self.sequences) // self.global_batch_size)

    def window(self, step: int) -> Window:
        """Step `step`, counted from 0 over all epochs.

        Every rank gets equally many micro-batches, for they meet in collectives; where sequences
        run out, a micro-batch holds one of padding without targets.
        """
        dealt = self._deal(self._sequences_of(step))
        batches = [self._collate(part) for part in dealt]
        lengths = [self.rows.length(r) for part in dealt for rows in part for r in rows]
        return Window(
            batches,
            target_tokens=torch.stack([(b.target_ids != IGNORED).sum() for b in batches]).sum(),
            tokens=torch.tensor(sum(lengths)),
            rows=torch.tensor(len(lengths)),
            positions=torch.tensor(sum(batch.input_ids.numel() for batch in batches)),
            pairs=torch.tensor(sum(length * (length + 1) // 2 for length in lengths)),
        )

    def extent(self, step: int) -> tuple[int, int]:
        """(tokens, positions) that this rank computes in a step, as `window` lays them out."""
        dealt = [
            [self._length(rows) for rows in part] for part in self._deal(self._sequences_of(step))
        ]
        widths = [padded(max(part, default=1), self.pad_to_multiple_of) for part in dealt]
        positions = sum(w * max(1, len(part)) for w, part in zip(widths, dealt, strict=True))
        return sum(map(sum, dealt)), positions

    def _sequences_of(self, step: int) -> list[list[int]]:
        """The row numbers of each sequence of a step, the longest sequence first."""
        epoch, index = divmod(step, self.steps_per_epoch)
        begin = index * self.global_batch_size
        end = min(begin + self.global_batch_size, len(self.sequences))
        found = [self.sequences[number] for number in self.order(epoch, begin, end)]
        if self.pack_steps_to is not None:
            rows = np.asarray([row for sequence in found for row in sequence], np.int64)
            lengths = np.asarray([self.rows.length(row) for row in rows.tolist()])
            packed = pack(rows, lengths, self.pack_steps_to)
            found = [packed[number] for number in range(len(packed))]
        return sorted(found, key=lambda rows: -self._length(rows))

    def _deal(self, sequences: list[list[int]]) -> list[list[list[int]]]:
        """This rank's of each micro-batch. The longest first and dealt like cards: sequences of
        like length meet in a batch (less padding) and in a round (ranks wait less for each other).
        The step's sum over rows is the same."""
        per_round = self.world_size * self.micro_batch_size
        rounds = (sequences[at : at + per_round] for at in range(0, len(sequences), per_round))
        return [dealt[self.rank :: self.world_size] for dealt in rounds]

    def _length(self, rows: list[int]) -> int:
        return sum(self.rows.length(row) for row in rows)

    def _collate(self, sequences: list[list[int]]) -> MicroBatch:
        found = [[self.rows[row] for row in rows] for rows in sequences]
        return collate(found, self.pad_to_multiple_of, self.pad_token_id, self.packed)
