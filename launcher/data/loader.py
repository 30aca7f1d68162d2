"""Which rows a step sees, and their batches. Index-based: any step is reached in O(1)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from launcher.data.dataset import Rows

IGNORED = -100  # cross_entropy's ignore_index
TARGETS = 64  # a micro-batch has a multiple of so many: every new shape costs time


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of rows, right-padded. Causal attention never looks at the padding, so
    no attention mask is needed."""

    input_ids: torch.Tensor  # [rows, length] int64
    target_at: torch.Tensor  # [n] int64: places in the flattened [rows, length] that have a target
    target_ids: torch.Tensor  # [n] int64: the token to predict there; IGNORED: n is filled up

    def to(self, device: torch.device) -> MicroBatch:
        tensors = (self.input_ids, self.target_at, self.target_ids)
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class Window:
    """This rank's share of one optimizer step."""

    micro_batches: list[MicroBatch]
    target_tokens: torch.Tensor  # 0-d int64 on the CPU: targets of this rank
    tokens: torch.Tensor  # 0-d int64 on the CPU: tokens of this rank's rows, without padding


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
        return Window(
            batches,
            torch.stack([(batch.target_ids != IGNORED).sum() for batch in batches]).sum(),
            torch.tensor(sum(len(self.rows[row][0]) for part in mine for row in part)),
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
        return MicroBatch(input_ids, *_with_target(targets.flatten()))


def _with_target(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(places, targets there) of those that are not IGNORED, filled up to a multiple of TARGETS,
    and to one at least, with a place and no target."""
    at = (targets != IGNORED).nonzero().squeeze(1)
    count = max(1, -(-len(at) // TARGETS)) * TARGETS
    places = torch.zeros(count, dtype=torch.int64)
    ids = torch.full((count,), IGNORED, dtype=torch.int64)
    places[: len(at)], ids[: len(at)] = at, targets[at]
    return places, ids


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, length: int) -> torch.Tensor:
    """One epoch's order: drawn once, not at every step."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
