"""Rows to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.data.dataset import Row

IGNORED = -100  # cross_entropy's ignore_index
TARGET_MULTIPLE = 64  # the number of targets is padded to a multiple: each new shape costs time


@dataclass(frozen=True)
class Documents:
    """Where the rows of packed sequences are, for an attention that keeps them separate.

    The padding of a sequence is a document too.
    """

    position_ids: torch.Tensor  # [sequences, length] int64: positions within the document
    cu_seqlens: torch.Tensor  # [documents + 1] int32: cumulative lengths in the flattened batch
    lengths: tuple[int, ...]  # on the host, so that nothing waits for the device to read them

    def forward_arguments(self) -> dict[str, Any]:
        """The arguments of the model's forward, with transformers' names."""
        longest = max(self.lengths)
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
            "document_lengths": self.lengths,
        }


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward, padded on the right. With causal attention no token attends to
    the padding, so no attention mask is needed."""

    input_ids: torch.Tensor  # [sequences, length] int64
    target_positions: torch.Tensor  # [n] int64: positions in the flattened ids that have a target
    target_ids: torch.Tensor  # [n] int64: the token to predict there; IGNORED where n is padded
    documents: Documents | None = None  # of packed sequences
    lengths: torch.Tensor | None = None  # [sequences] int64: without padding; None: no padding

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward."""
        documents = self.documents.forward_arguments() if self.documents else {}
        return {"input_ids": self.input_ids, "use_cache": False, **documents}

    def is_token(self) -> torch.Tensor:
        """[sequences, length]: False at padding."""
        if self.lengths is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < self.lengths[:, None]

    def to(self, device: torch.device) -> MicroBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Copy to pinned memory, from which a GPU copies while the host continues."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        documents = self.documents and replace(
            self.documents,
            position_ids=change(self.documents.position_ids),
            cu_seqlens=change(self.documents.cu_seqlens),
        )
        return MicroBatch(
            change(self.input_ids),
            change(self.target_positions),
            change(self.target_ids),
            documents,
            None if self.lengths is None else change(self.lengths),
        )


def collate(
    sequences: list[list[Row]], multiple: int, pad_token_id: int, packed: bool
) -> MicroBatch:
    """Make a micro-batch of sequences of one row or, if `packed`, of several.

    The length is padded to a multiple of `multiple`. Without sequences, the micro-batch has one
    sequence of padding.
    """
    longest = max((sum(len(ids) for ids, _ in rows) for rows in sequences), default=1)
    length = padded_length(longest, multiple)
    shape = (max(1, len(sequences)), length)
    input_ids = np.full(shape, pad_token_id, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    lengths = np.zeros(len(input_ids), np.int64)
    for number, rows in enumerate(sequences):
        begin = 0
        for ids, loss_mask in rows:
            end = begin + len(ids)
            input_ids[number, begin:end] = ids
            # Position t predicts token t + 1. Targets are shifted here, so logits need not be.
            targets[number, begin : max(begin, end - 1)] = np.where(loss_mask[1:], ids[1:], IGNORED)
            begin = end
        lengths[number] = begin
    documents = _build_documents(sequences or [[]], length) if packed else None
    positions, target_ids = _select_targets(targets.reshape(-1))
    return MicroBatch(
        torch.from_numpy(input_ids), positions, target_ids, documents, torch.from_numpy(lengths)
    )


def _select_targets(targets: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, target ids) of the targets that are not IGNORED, padded with position 0 and
    IGNORED to a multiple of TARGET_MULTIPLE, at least one multiple."""
    used = np.flatnonzero(targets != IGNORED)
    count = padded_length(len(used), TARGET_MULTIPLE)
    positions, ids = np.zeros(count, np.int64), np.full(count, IGNORED)
    positions[: len(used)], ids[: len(used)] = used, targets[used]
    return torch.from_numpy(positions), torch.from_numpy(ids)


def padded_length(length: int, multiple: int) -> int:
    """`length`, but at least 1, rounded up to a multiple of `multiple`."""
    return -(-max(1, length) // multiple) * multiple


def _build_documents(sequences: list[list[Row]], length: int) -> Documents:
    lengths: list[int] = []
    for rows in sequences:
        row_lengths = [len(ids) for ids, _ in rows]
        lengths += [n for n in (*row_lengths, length - sum(row_lengths)) if n]
    positions = np.concatenate([np.arange(n) for n in lengths])
    return Documents(
        torch.from_numpy(positions.reshape(len(sequences), length)),
        torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        tuple(lengths),
    )
