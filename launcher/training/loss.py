"""The loss of a micro-batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.data.collate import IGNORED, MicroBatch
from launcher.model.chunked_loss import Targets, loss_targets
from launcher.model.logit_transform import PassBy


def token_loss(model: nn.Module, batch: MicroBatch, label_smoothing: float = 0.0) -> torch.Tensor:
    """The cross-entropy of `batch`, summed over its target tokens: 0-d, fp32.

    Attention is causal, without an attention mask.
    """
    shape = batch.input_ids.shape
    targets = Targets(batch.target_positions, batch.target_ids, shape, label_smoothing)
    with loss_targets(targets):
        logits = model(**batch.inputs()).logits
    if targets.passed_by:  # the model has changed the sum, as it changes logits
        loss: torch.Tensor = PassBy.apply(logits, targets.passed_by.pop())
        return loss
    if logits.ndim == 0:  # launcher.model.chunked_loss has computed the sum
        return logits  # type: ignore[no-any-return]
    return cross_entropy(
        logits.flatten(0, 1).index_select(0, batch.target_positions).float(),
        batch.target_ids,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
