"""What can be configured, and the gate that every run passes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.cluster import CLUSTERS, ClusterConfig
from launcher.config.data import DataConfig
from launcher.config.method import METHODS, MethodConfig
from launcher.config.model import ModelConfig
from launcher.config.optimizer import OPTIMIZERS, OptimizerConfig
from launcher.config.precision import PRECISIONS, PrecisionConfig
from launcher.config.scheduler import SCHEDULERS, SchedulerConfig
from launcher.config.strategy import STRATEGIES, StrategyConfig
from launcher.config.tracking import TrackingConfig
from launcher.config.training import CheckpointConfig, LaunchConfig, TrainingConfig


@dataclass(kw_only=True, slots=True)
class Config:
    """A checked configuration. Built by `store.build` alone; parts receive sections, never this."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    strategy: StrategyConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    tracking: TrackingConfig
    cluster: ClusterConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    launch: LaunchConfig
    run_dir: str | None
    resume: str  # none, auto, or the path of a checkpoint or run
    resume_force: bool


# Settings that stand in no section.
TOP_LEVEL = ("run_dir", "resume", "resume_force")

# A section with several schemas chooses by its `name`.
SECTIONS: dict[str, type | dict[str, type]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": METHODS,
    "strategy": STRATEGIES,
    "precision": PRECISIONS,
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULERS,
    "tracking": TrackingConfig,
    "cluster": CLUSTERS,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "launch": LaunchConfig,
}
