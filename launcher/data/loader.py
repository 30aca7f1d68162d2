"""Which rows a step sees, and their batches. Index-based: any step is reached in O(1)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from launcher.data.dataset import Rows

IGNORED = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of rows, right-padded. Causal attention never looks at the padding, so
    no attention mask is needed."""

    input_ids: torch.Tensor  # [rows, length] int64
    targets: torch.Tensor  # [rows, length] int64: the token to predict at each place, or IGNORED

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        )


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
    """Deals rows to ranks. A step's rows depend on the seed and the step, not on the ranks."""

    rows: Rows
    chosen: Sequence[int]  # the rows of this split
    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int
    pad_to_multiple_of: int
    pad_token_id: int
    seed: int | None  # None: in order

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left."""
        return -(-len(self.chosen) // self.global_batch_size)

    def window(self, step: int) -> Window:
        """Step `step`, counted from 0 over all epochs.

        Every rank gets equally many micro-batches, for they meet in collectives; where rows run
        out, a micro-batch holds one padding row without targets.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        begin = index * self.global_batch_size
        rows = self._rows(epoch, begin, min(begin + self.global_batch_size, len(self.chosen)))
        per_round = self.world_size * self.micro_batch_size
        # Longest first and dealt like cards: rows of like length meet in a batch (less padding) and
        # in a round (ranks wait less for each other). The step's sum over rows is the same.
        rows.sort(key=lambda row: -len(self.rows[row][0]))
        rounds = (rows[at : at + per_round] for at in range(0, len(rows), per_round))
        mine = [dealt[self.rank :: self.world_size] for dealt in rounds]
        batches = [self._collate([self.rows[row] for row in part]) for part in mine]
        lengths = [len(self.rows[row][0]) for part in mine for row in part]
        return Window(
            batches,
            target_tokens=torch.stack([(b.targets != IGNORED).sum() for b in batches]).sum(),
            tokens=torch.tensor(sum(lengths)),
            rows=torch.tensor(len(lengths)),
            positions=torch.tensor(sum(batch.input_ids.numel() for batch in batches)),
            pairs=torch.tensor(sum(length * (length + 1) // 2 for length in lengths)),
        )

    def windows(self) -> Iterator[Window]:
        """One epoch."""
        return (self.window(step) for step in range(self.steps_per_epoch))

    def _rows(self, epoch: int, begin: int, end: int) -> list[int]:
        """Row numbers at places [begin, end) of the epoch's order."""
        if self.seed is None:
            return list(self.chosen[begin:end])
        order = _permutation(self.seed + 1_000_003 * epoch, len(self.chosen))
        return [self.chosen[at] for at in order[begin:end].tolist()]

    def _collate(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> MicroBatch:
        longest = max((len(ids) for ids, _ in rows), default=1)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (max(1, len(rows)), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        targets = torch.full(shape, IGNORED, dtype=torch.int64)
        for at, (ids, trained) in enumerate(rows):
            input_ids[at, : len(ids)] = ids
            # Place t predicts token t + 1: shifted here, so that logits need not be cut.
            targets[at, : len(ids) - 1] = torch.where(trained[1:], ids[1:].long(), IGNORED)
        return MicroBatch(input_ids, targets)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, length: int) -> torch.Tensor:
    """One epoch's order: drawn once, not at every step."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
