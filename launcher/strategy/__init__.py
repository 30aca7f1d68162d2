"""How state is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable

from launcher.config.strategy import StrategyConfig
from launcher.config.training import TrainingConfig
from launcher.distributed.process_group import Place
from launcher.precision import Precision
from launcher.strategy.base import StepResult, Strategy, TrainedState


def build_strategy(
    config: StrategyConfig, training: TrainingConfig, place: Place, precision: Precision
) -> Strategy:
    return STRATEGIES[config.name]()(config, training, place, precision)


def _fsdp() -> type[Strategy]:
    from launcher.strategy.fsdp import Fsdp

    return Fsdp


def _deepspeed() -> type[Strategy]:
    from launcher.strategy.deepspeed import DeepSpeed  # seconds to import, needed by its runs only

    return DeepSpeed


# Two mechanisms: fully_shard on meshes of different shape, and DeepSpeed's engine by its stage.
STRATEGIES: dict[str, Callable[[], type[Strategy]]] = {
    **dict.fromkeys(("single", "ddp", "fsdp", "fsdp_offload", "hsdp"), _fsdp),
    **dict.fromkeys(("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"), _deepspeed),
}

__all__ = ["STRATEGIES", "StepResult", "Strategy", "TrainedState", "build_strategy"]
