"""The loss of a micro-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.data.collate import IGNORED, MicroBatch
from launcher.errors import UserError
from launcher.model.chunked_loss import Targets, loss_targets
from launcher.model.router_loss import RouterLoss


class Losses(NamedTuple):
    """The losses of a micro-batch, each 0-d and fp32."""

    target_tokens: torch.Tensor  # the cross-entropy, summed over its target tokens
    router: torch.Tensor  # the routers' auxiliary loss, summed over its tokens


def losses(
    model: nn.Module, batch: MicroBatch, label_smoothing: float, router_loss: RouterLoss
) -> Losses:
    """The cross-entropy and the auxiliary loss of routers, from one forward.

    The auxiliary loss is a mean over tokens, times a measure of how uneven the micro-batch uses the
    experts. It is returned as a sum, so that micro-batches and ranks count by their tokens.
    """
    is_token = batch.is_token()
    count = is_token.sum()
    # A micro-batch of padding counts nothing; without any token the mean would not be finite.
    seen = is_token.index_fill(1, torch.zeros(1, dtype=torch.int64, device=is_token.device), True)
    targets = Targets(
        batch.target_positions, batch.target_ids, batch.input_ids.shape, label_smoothing
    )
    with loss_targets(targets), router_loss.of_tokens(seen):
        output = model(**batch.inputs(), output_router_logits=True)
    if not torch.is_tensor(output.aux_loss):
        raise UserError(
            "training.router_aux_loss: the model has not computed an auxiliary loss, because no "
            "layer of it has a router → training.router_aux_loss=off"
        )
    return Losses(_sum_loss(output.logits, batch, label_smoothing), output.aux_loss.float() * count)


def token_loss(model: nn.Module, batch: MicroBatch, label_smoothing: float = 0.0) -> torch.Tensor:
    """The cross-entropy of `batch`, summed over its target tokens: 0-d, fp32.

    Attention is causal, without an attention mask.
    """
    shape = batch.input_ids.shape
    with loss_targets(Targets(batch.target_positions, batch.target_ids, shape, label_smoothing)):
        logits = model(**batch.inputs()).logits
    return _sum_loss(logits, batch, label_smoothing)


def _sum_loss(logits: torch.Tensor, batch: MicroBatch, label_smoothing: float) -> torch.Tensor:
    if logits.ndim == 0:  # launcher.model.chunked_loss has computed the sum
        return logits
    return cross_entropy(
        logits.flatten(0, 1).index_select(0, batch.target_positions).float(),
        batch.target_ids,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
