"""The loss of a micro-batch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.data.collate import IGNORED, MicroBatch
from launcher.errors import UserError
from launcher.model.chunked_loss import Targets, loss_targets
from launcher.model.router_loss import RouterLoss


class RouterShare(NamedTuple):
    """The auxiliary loss of routers, and the tokens of all ranks in the step, which it averages."""

    loss: RouterLoss
    tokens: int


def weighted_losses(
    model: nn.Module,
    batch: MicroBatch,
    targets: int,
    label_smoothing: float,
    router: RouterShare | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what to minimize, 0-d; what to report: the share in the mean loss over the `targets` of a
    step and, with `router`, that in the mean auxiliary loss). fp32.

    The auxiliary loss of a micro-batch is a mean over its tokens. It is weighted by their number,
    so that micro-batches and ranks count by their tokens.
    """
    if router is None:
        loss = token_loss(model, batch, label_smoothing) / targets
        return loss, loss.detach()[None]
    is_token = batch.is_token()
    count = is_token.sum()
    is_token[:, 0] = True  # a micro-batch of padding has weight 0, and its mean must be finite
    with _targets_of(batch, label_smoothing), router.loss.of_tokens(is_token):
        output = model(**batch.inputs(), output_router_logits=True)
    if not torch.is_tensor(output.aux_loss):
        raise UserError(
            "training.router_aux_loss: the model has not computed an auxiliary loss, because none "
            "of its layers has a router → training.router_aux_loss=off"
        )
    loss = _sum_loss(output.logits, batch, label_smoothing) / targets
    aux_loss = output.aux_loss.float() * count / router.tokens
    reported = torch.stack([loss.detach(), aux_loss.detach()])
    return loss + router.loss.coefficient * aux_loss, reported


def token_loss(model: nn.Module, batch: MicroBatch, label_smoothing: float = 0.0) -> torch.Tensor:
    """The cross-entropy of `batch`, summed over its target tokens: 0-d, fp32.

    Attention is causal, without an attention mask.
    """
    with _targets_of(batch, label_smoothing):
        logits = model(**batch.inputs()).logits
    return _sum_loss(logits, batch, label_smoothing)


def _targets_of(batch: MicroBatch, label_smoothing: float) -> AbstractContextManager[None]:
    shape = batch.input_ids.shape
    return loss_targets(Targets(batch.target_positions, batch.target_ids, shape, label_smoothing))


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
