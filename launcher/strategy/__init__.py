"""How state is spread over ranks."""

from __future__ import annotations

from launcher.config.strategy import StrategyConfig
from launcher.distributed.process_group import Place
from launcher.precision import Precision
from launcher.strategy.base import StepResult, Strategy
from launcher.strategy.fsdp import Fsdp

# single, ddp, fsdp and hsdp are one mechanism on meshes of different shape.
STRATEGIES: dict[str, type[Strategy]] = {"single": Fsdp, "ddp": Fsdp, "fsdp": Fsdp, "hsdp": Fsdp}


def build_strategy(config: StrategyConfig, place: Place, precision: Precision) -> Strategy:
    return STRATEGIES[config.name](config, place, precision)


__all__ = ["STRATEGIES", "StepResult", "Strategy", "build_strategy"]
