"""The loss of a micro-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.data.collate import IGNORED, MicroBatch
from launcher.errors import UserError
from launcher.model.chunked_loss import Targets, loss_targets
from launcher.model.logit_transform import PassBy
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
    wanted = _targets_of(batch, label_smoothing)
    with loss_targets(wanted), router.loss.of_tokens(is_token):
        output = model(**batch.inputs(), output_router_logits=True)
    if not torch.is_tensor(output.aux_loss):
        raise UserError(
            "training.router_aux_loss: the model has not computed an auxiliary loss, because none "
            "of its layers has a router → training.router_aux_loss=off"
        )
    loss = _sum_loss(output.logits, wanted) / targets
    aux_loss = output.aux_loss.float() * count / router.tokens
    reported = torch.stack([loss.detach(), aux_loss.detach()])
    return loss + router.loss.coefficient * aux_loss, reported


def token_loss(model: nn.Module, batch: MicroBatch, label_smoothing: float = 0.0) -> torch.Tensor:
    """The cross-entropy of `batch`, summed over its target tokens: 0-d, fp32.

    Attention is causal, without an attention mask.
    """
    targets = _targets_of(batch, label_smoothing)
    with loss_targets(targets):
        logits = model(**batch.inputs()).logits
    return _sum_loss(logits, targets)


def _targets_of(batch: MicroBatch, label_smoothing: float) -> Targets:
    shape = batch.input_ids.shape
    return Targets(batch.target_positions, batch.target_ids, shape, label_smoothing)


def _sum_loss(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    if targets.passed_by:  # the model has changed the sum, as it changes logits
        loss: torch.Tensor = PassBy.apply(logits, targets.passed_by.pop())
        return loss
    if logits.ndim == 0:  # launcher.model.chunked_loss has computed the sum
        return logits
    return cross_entropy(
        logits.flatten(0, 1).index_select(0, targets.positions).float(),
        targets.ids,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=targets.smoothing,
    )
