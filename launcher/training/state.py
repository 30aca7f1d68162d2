"""The state of a training: everything that a checkpoint saves and restores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from launcher.distributed.process_group import RankInfo
from launcher.method.base import Method
from launcher.model.router_loss import RouterLoss
from launcher.strategy import Strategy
from launcher.training.early_stopping import EarlyStopping
from launcher.training.flops import Flops
from launcher.training.scheduler import Schedule
from launcher.training.spikes import Spikes


@dataclass(frozen=True)
class Progress:
    """The steps done, and the tokens that all ranks have read in them."""

    step: int = 0
    tokens: int = 0


@dataclass
class TrainState:
    """The parts of a run that change while it trains, and a description of their origin."""

    strategy: Strategy
    method: Method
    model: nn.Module  # as the method prepared it, without the strategy's wrapper
    scheduler: Schedule
    rank_info: RankInfo
    origin: dict[str, Any]  # base model, data, ranks, strategy; goes into every trainer.json
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    spikes: Spikes = field(default_factory=Spikes)
    flops: Flops | None = None  # of the model; None: not known
    router_loss: RouterLoss | None = None  # that is trained on; None: off
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)  # {}: as in the base
    step: int = 0  # that is being trained, from 1; 0: before the first
    end_tokens: tuple[int, ...] | None = None  # that end an answer; None: the rows have no answers

    @property
    def vocabulary_size(self) -> int:
        """The number of rows of the input embedding."""
        embedding: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return embedding.num_embeddings
