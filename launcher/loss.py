"""The loss of a micro-batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.data.batch import IGNORED, MicroBatch
from launcher.model.head import Targets, predicting


def token_loss(model: nn.Module, batch: MicroBatch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy in fp32, summed over the targets of `batch`. Causal, without attention mask."""
    shape = batch.input_ids.shape
    with predicting(Targets(batch.target_at, batch.target_ids, shape, label_smoothing)):
        logits = model(**batch.inputs()).logits
    if logits.ndim == 0:  # the head has summed it: launcher.model.head
        return logits  # type: ignore[no-any-return]
    return cross_entropy(
        logits.flatten(0, 1).index_select(0, batch.target_at).float(),
        batch.target_ids,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
