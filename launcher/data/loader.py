"""Which rows a step trains on, and their batches. Any step is computed directly, without the steps
before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from launcher.data.collate import IGNORED, MicroBatch, collate, padded_length
from launcher.data.dataset import Row
from launcher.data.packing import Sequences, pack
from launcher.data.sampler import Sampler


class IndexedRows(Protocol):
    """Rows by number, read from the cache or tokenized on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Row: ...
    def length(self, row: int) -> int: ...


@dataclass(frozen=True)
class StepBatch:
    """This rank's share of one optimizer step. Counts are 0-d int64 tensors on the CPU."""

    micro_batches: list[MicroBatch]
    target_tokens: torch.Tensor
    tokens: torch.Tensor  # without padding
    rows: torch.Tensor  # without sequences of padding only
    positions: torch.Tensor  # with padding
    pairs: torch.Tensor  # pairs of a token and a token that it attends to (itself included)

    @property
    def counts(self) -> tuple[torch.Tensor, ...]:
        return self.target_tokens, self.tokens, self.rows, self.positions, self.pairs


def batch_of(step: int, left_out: Sequence[int]) -> int:
    """The batch that `step` takes, if those of `left_out`, in order, are left out. Both count from
    0 over all epochs."""
    batch = step
    for each in left_out:
        batch += each <= batch
    return batch


@dataclass(frozen=True)
class Loader:
    """The batches of one rank.

    The rows of a step depend on the seed and the step, not on the number of ranks.
    """

    rows: IndexedRows
    sequences: Sequences  # of an epoch
    sampler: Sampler
    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int
    pad_to_multiple_of: int
    pad_token_id: int
    packed: bool = False
    # In tokens: the rows of each step are packed to sequences of this length when it is loaded.
    step_packing_length: int | None = None
    left_out: tuple[int, ...] = ()  # batches, in order: the steps take the others

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer sequences."""
        return -(-len(self.sequences) // self.global_batch_size)

    def step_batch(self, step: int) -> StepBatch:
        """The batch of `step`, which counts from 0 over all epochs.

        Every rank gets the same number of micro-batches, because each one needs collectives. A
        micro-batch without sequences gets one sequence of padding, without targets.
        """
        micro_batches = self._assign(self._step_sequences(step))
        batches = [self._collate(sequences) for sequences in micro_batches]
        lengths = [
            self.rows.length(row)
            for sequences in micro_batches
            for sequence in sequences
            for row in sequence
        ]
        return StepBatch(
            batches,
            target_tokens=torch.stack([(b.target_ids != IGNORED).sum() for b in batches]).sum(),
            tokens=torch.tensor(sum(lengths)),
            rows=torch.tensor(len(lengths)),
            positions=torch.tensor(sum(batch.input_ids.numel() for batch in batches)),
            pairs=torch.tensor(sum(length * (length + 1) // 2 for length in lengths)),
        )

    def rows_of(self, step: int) -> list[int]:
        """The numbers of the rows of `step`, which counts from 0, on all ranks, in order."""
        return sorted(row for sequence in self._step_sequences(step) for row in sequence)

    def count_positions(self, step: int) -> tuple[int, int]:
        """(tokens, positions with padding) of `step_batch(step)`, without loading its rows."""
        micro_batches = [
            [self._length(sequence) for sequence in sequences]
            for sequences in self._assign(self._step_sequences(step))
        ]
        widths = [
            padded_length(max(lengths, default=1), self.pad_to_multiple_of)
            for lengths in micro_batches
        ]
        positions = sum(
            width * max(1, len(lengths))
            for width, lengths in zip(widths, micro_batches, strict=True)
        )
        return sum(map(sum, micro_batches)), positions

    def _step_sequences(self, step: int) -> list[list[int]]:
        """The row numbers of each sequence of a step on all ranks, the longest sequence first."""
        epoch, index = divmod(batch_of(step, self.left_out), self.steps_per_epoch)
        begin = index * self.global_batch_size
        end = min(begin + self.global_batch_size, len(self.sequences))
        sequences = [self.sequences[number] for number in self.sampler(epoch, begin, end)]
        if self.step_packing_length is not None:
            rows = np.asarray([row for sequence in sequences for row in sequence], np.int64)
            lengths = np.asarray([self.rows.length(row) for row in rows.tolist()])
            packed = pack(rows, lengths, self.step_packing_length)
            sequences = [packed[number] for number in range(len(packed))]
        return sorted(sequences, key=lambda rows: -self._length(rows))

    def _assign(self, sequences: list[list[int]]) -> list[list[list[int]]]:
        """The sequences of each of this rank's micro-batches.

        Sequences are sorted by length and assigned to the ranks round-robin. Sequences of similar
        length so come into the same micro-batch (less padding) and into micro-batches that the
        ranks compute at the same time (less waiting). The loss of the step is the same.
        """
        group_size = self.world_size * self.micro_batch_size
        groups = (
            sequences[begin : begin + group_size] for begin in range(0, len(sequences), group_size)
        )
        return [group[self.rank :: self.world_size] for group in groups]

    def _length(self, rows: list[int]) -> int:
        return sum(self.rows.length(row) for row in rows)

    def _collate(self, sequences: list[list[int]]) -> MicroBatch:
        rows = [[self.rows[row] for row in sequence] for sequence in sequences]
        return collate(rows, self.pad_to_multiple_of, self.pad_token_id, self.packed)
