"""What a checkpoint holds and brings back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from launcher.distributed.process_group import Place
from launcher.flops import Flops
from launcher.method.base import Method
from launcher.scheduler import Schedule
from launcher.strategy import Strategy
from launcher.watch import Watch


@dataclass(frozen=True)
class Learner:
    """The parts of a run that change while it trains, and what they learn from."""

    strategy: Strategy
    method: Method
    model: nn.Module  # as the method made it, without the strategy's wrapper
    scheduler: Schedule
    place: Place
    group: dist.ProcessGroup  # all ranks, on CPU, for checkpoints alone
    about: dict[str, Any]  # into every trainer.json: base model, data, ranks, strategy
    watch: Watch = field(default_factory=Watch)
    flops: Flops | None = None  # of a step; None: not known of this model
    tokenizer: PreTrainedTokenizerBase | None = None  # where it is not the base's: it travels along
