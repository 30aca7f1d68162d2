"""Rows into the tensors of one forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.data.dataset import Row

IGNORED = -100  # cross_entropy's ignore_index
TARGETS = 64  # a micro-batch has a multiple of so many: every new shape costs time


@dataclass(frozen=True)
class Documents:
    """Where the rows of packed sequences lie, for an attention that keeps them apart. What pads a
    sequence is a document too."""

    position_ids: torch.Tensor  # [sequences, length] int64: places within the document
    starts: torch.Tensor  # [documents + 1] int32: cumulative lengths over the flattened batch
    lengths: tuple[int, ...]  # the same on the host: nobody waits for the device to know them

    def arguments(self) -> dict[str, Any]:
        """For the model's forward, under transformers' names of them."""
        longest = max(self.lengths)
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.starts,
            "cu_seq_lens_k": self.starts,
            "max_length_q": longest,
            "max_length_k": longest,
            "document_lengths": self.lengths,
        }


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of sequences, right-padded. Causal attention never looks at the padding,
    so no attention mask is needed."""

    input_ids: torch.Tensor  # [sequences, length] int64
    target_at: torch.Tensor  # [n] int64: places in the flattened ids that have a target
    target_ids: torch.Tensor  # [n] int64: the token to predict there; IGNORED: n is filled up
    documents: Documents | None = None  # of packed sequences

    def inputs(self) -> dict[str, Any]:
        """What the model's forward is called with."""
        documents = self.documents.arguments() if self.documents else {}
        return {"input_ids": self.input_ids, "use_cache": False, **documents}

    def to(self, device: torch.device) -> MicroBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """In memory that a GPU copies from while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Any) -> MicroBatch:
        documents = self.documents and replace(
            self.documents,
            position_ids=change(self.documents.position_ids),
            starts=change(self.documents.starts),
        )
        return MicroBatch(
            change(self.input_ids), change(self.target_at), change(self.target_ids), documents
        )


def collate(
    sequences: list[list[Row]], multiple: int, pad_token_id: int, packed: bool
) -> MicroBatch:
    """Sequences of one row or, `packed`, of several, padded to a multiple of `multiple`. Without
    any there is one of padding."""
    longest = max((sum(len(ids) for ids, _ in rows) for rows in sequences), default=1)
    length = padded(longest, multiple)
    shape = (max(1, len(sequences)), length)
    input_ids = np.full(shape, pad_token_id, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    for number, rows in enumerate(sequences):
        at = 0
        for ids, trained in rows:
            end = at + len(ids)
            input_ids[number, at:end] = ids
            # Place t predicts token t + 1: shifted here, so that logits need not be cut.
            targets[number, at : max(at, end - 1)] = np.where(trained[1:], ids[1:], IGNORED)
            at = end
    documents = _documents(sequences or [[]], length) if packed else None
    places, wanted = _with_target(targets.reshape(-1))
    return MicroBatch(torch.from_numpy(input_ids), places, wanted, documents)


def _with_target(targets: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """(places, targets there) of those that are not IGNORED, filled up to a multiple of TARGETS,
    and to one at least, with a place and no target."""
    at = np.flatnonzero(targets != IGNORED)
    count = padded(len(at), TARGETS)
    places, ids = np.zeros(count, np.int64), np.full(count, IGNORED)
    places[: len(at)], ids[: len(at)] = at, targets[at]
    return torch.from_numpy(places), torch.from_numpy(ids)


def padded(length: int, multiple: int) -> int:
    """`length`, at least 1, rounded up."""
    return -(-max(1, length) // multiple) * multiple


def _documents(sequences: list[list[Row]], length: int) -> Documents:
    lengths: list[int] = []
    for rows in sequences:
        own = [len(ids) for ids, _ in rows]
        lengths += [each for each in (*own, length - sum(own)) if each]
    positions = np.concatenate([np.arange(each) for each in lengths])
    return Documents(
        torch.from_numpy(positions.reshape(len(sequences), length)),
        torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        tuple(lengths),
    )
