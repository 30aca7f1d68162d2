"""The configuration: its sections and their schemas. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.cluster import CLUSTERS, ClusterConfig
from launcher.config.schema.data import DataConfig
from launcher.config.schema.method import METHODS, MethodConfig
from launcher.config.schema.model import ModelConfig
from launcher.config.schema.optimizer import OPTIMIZERS, OptimizerConfig
from launcher.config.schema.precision import PRECISIONS, AutoPrecisionConfig, PrecisionConfig
from launcher.config.schema.scheduler import SCHEDULERS, SchedulerConfig
from launcher.config.schema.strategy import STRATEGIES, AutoStrategyConfig, StrategyConfig
from launcher.config.schema.tracking import TrackingConfig
from launcher.config.schema.training import CheckpointConfig, LaunchConfig, TrainingConfig


@dataclass(kw_only=True, slots=True)
class Config:
    """A checked configuration, built only by `store.build`. Parts of a run receive its sections."""

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


# Settings outside the sections.
TOP_LEVEL = ("run_dir", "resume", "resume_force")

# A section with several schemas selects one of them by its `name`.
SECTIONS: dict[str, type | dict[str, type]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": METHODS,
    # A rank trains with one of those that auto becomes.
    "strategy": {"auto": AutoStrategyConfig, **STRATEGIES},
    "precision": {"auto": AutoPrecisionConfig, **PRECISIONS},
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULERS,
    "tracking": TrackingConfig,
    "cluster": CLUSTERS,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "launch": LaunchConfig,
}
