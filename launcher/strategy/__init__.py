"""How the training state is distributed over the ranks."""

from __future__ import annotations

from collections.abc import Callable

from launcher.config.schema.strategy import StrategyConfig
from launcher.config.schema.training import TrainingConfig
from launcher.distributed.process_group import RankInfo
from launcher.strategy.base import StepResult, Strategy, TrainedState
from launcher.strategy.precision import Precision


def build_strategy(
    config: StrategyConfig, training: TrainingConfig, rank_info: RankInfo, precision: Precision
) -> Strategy:
    """The strategy that `config` names, before its `setup`."""
    return STRATEGIES[config.name]()(config, training, rank_info, precision)


def _fsdp() -> type[Strategy]:
    from launcher.strategy.fsdp import Fsdp

    return Fsdp


def _deepspeed() -> type[Strategy]:
    from launcher.strategy.deepspeed import DeepSpeed  # takes seconds to import

    return DeepSpeed


# Two implementations: `fully_shard` on meshes of different shapes, and DeepSpeed's ZeRO stages.
STRATEGIES: dict[str, Callable[[], type[Strategy]]] = {
    **dict.fromkeys(("single", "ddp", "fsdp", "fsdp_offload", "hsdp"), _fsdp),
    **dict.fromkeys(("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"), _deepspeed),
}

__all__ = ["STRATEGIES", "StepResult", "Strategy", "TrainedState", "build_strategy"]
