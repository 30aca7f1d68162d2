"""The rules of `optimizer=`, and of what else touches a step's arithmetic."""

from __future__ import annotations

import re

from launcher.config import Config
from launcher.config.optimizer import AdamwConfig, LionConfig, SgdConfig
from launcher.config.rule import Example, Rule, World
from launcher.config.strategy import ZeroConfig


def _wrong_betas(config: Config, world: World) -> bool:
    optimizer = config.optimizer
    if not isinstance(optimizer, AdamwConfig | LionConfig):
        return False
    return len(optimizer.betas) != 2 or max(optimizer.betas) >= 1


def _betas(config: Config) -> list[float]:
    assert isinstance(config.optimizer, AdamwConfig | LionConfig)
    return config.optimizer.betas


def _looks_ahead_of_nothing(config: Config, world: World) -> bool:
    optimizer = config.optimizer
    return isinstance(optimizer, SgdConfig) and optimizer.nesterov and optimizer.momentum == 0


def _strange_checkpointing(config: Config, world: World) -> bool:
    return not re.fullmatch(r"off|full|[1-9]\d*", config.training.activation_checkpointing)


OPTIMIZER_RULES: tuple[Rule, ...] = (
    Rule(
        "two-betas",
        "optimizer.betas are two numbers below 1",
        _wrong_betas,
        lambda c, w: f"optimizer.betas={_betas(c)} are not two numbers below 1",
        lambda c, w: "optimizer.betas=[0.9,0.999]",
        Example("optimizer.betas=[0.9]"),
    ),
    Rule(
        "nesterov-has-momentum",
        "optimizer.nesterov comes with a momentum",
        _looks_ahead_of_nothing,
        lambda c, w: "optimizer.nesterov=true looks ahead along optimizer.momentum, which is 0",
        lambda c, w: "optimizer.momentum=0.9, or optimizer.nesterov=false",
        Example("optimizer=sgd optimizer.nesterov=true optimizer.momentum=0"),
    ),
    Rule(
        "adafactor-sees-whole-matrices",
        "optimizer=adafactor runs where every rank holds whole tensors",
        lambda c, w: c.optimizer.name == "adafactor" and c.strategy.name not in ("single", "ddp"),
        lambda c, w: (
            "optimizer=adafactor keeps sums over rows and columns of whole matrices, and "
            f"strategy={c.strategy.name} gives it pieces, whose sums are others"
        ),
        lambda c, w: "strategy=ddp, or optimizer=adamw_8bit strategy=fsdp, or optimizer=adamw",
        Example("optimizer=adafactor strategy=fsdp"),
    ),
    Rule(
        "8bit-needs-tensors",
        "optimizer=adamw_8bit does not run under DeepSpeed",
        lambda c, w: c.optimizer.name == "adamw_8bit" and isinstance(c.strategy, ZeroConfig),
        lambda c, w: (
            f"optimizer=adamw_8bit quantises in blocks of a tensor, and strategy={c.strategy.name} "
            "shows it one flat run of many, where a block would mix tensors of different size"
        ),
        lambda c, w: "strategy=fsdp, or optimizer=adamw",
        Example("optimizer=adamw_8bit strategy=zero2"),
    ),
    Rule(
        "paging-needs-a-gpu",
        "optimizer=adamw_paged runs on GPUs",
        lambda c, w: c.optimizer.name == "adamw_paged" and w.gpus == 0,
        lambda c, w: (
            "optimizer=adamw_paged pages its state between GPU and host memory, and no GPU can be "
            "seen"
        ),
        lambda c, w: "optimizer=adamw, or optimizer=adamw_8bit",
        Example("optimizer=adamw_paged", gpus=0),
    ),
    Rule(
        "activation-checkpointing-is-known",
        "training.activation_checkpointing is off, full or a number of layers",
        _strange_checkpointing,
        lambda c, w: (
            f"training.activation_checkpointing={c.training.activation_checkpointing} is none of "
            "off, full and N (the first of every N layers)"
        ),
        lambda c, w: "training.activation_checkpointing=full",
        Example("training.activation_checkpointing=some"),
    ),
)
