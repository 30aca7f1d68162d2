"""The rules of `optimizer=` and of activation checkpointing."""

from __future__ import annotations

import re

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World
from launcher.config.schema.optimizer import AdamwConfig, LionConfig, SgdConfig
from launcher.config.schema.strategy import ZeroConfig


def _wrong_betas(config: Config, world: World) -> bool:
    optimizer = config.optimizer
    if not isinstance(optimizer, AdamwConfig | LionConfig):
        return False
    return len(optimizer.betas) != 2 or max(optimizer.betas) >= 1


def _betas(config: Config) -> list[float]:
    assert isinstance(config.optimizer, AdamwConfig | LionConfig)
    return config.optimizer.betas


def _nesterov_without_momentum(config: Config, world: World) -> bool:
    optimizer = config.optimizer
    return isinstance(optimizer, SgdConfig) and optimizer.nesterov and optimizer.momentum == 0


def _unknown_activation_checkpointing(config: Config, world: World) -> bool:
    return not re.fullmatch(r"off|full|[1-9]\d*", config.training.activation_checkpointing)


def _unknown_router_aux_loss(config: Config, world: World) -> bool:
    return not re.fullmatch(r"off|model|\d+(\.\d*)?(e-?\d+)?", config.training.router_aux_loss)


OPTIMIZER_RULES: tuple[Rule, ...] = (
    Rule(
        "two-betas",
        "optimizer.betas has two numbers below 1",
        _wrong_betas,
        lambda c, w: f"optimizer.betas={_betas(c)} must be two numbers below 1",
        lambda c, w: "optimizer.betas=[0.9,0.999]",
        Example("optimizer.betas=[0.9]"),
    ),
    Rule(
        "nesterov-has-momentum",
        "optimizer.nesterov needs a momentum",
        _nesterov_without_momentum,
        lambda c, w: "optimizer.nesterov=true needs a momentum, but optimizer.momentum=0",
        lambda c, w: "optimizer.momentum=0.9, or optimizer.nesterov=false",
        Example("optimizer=sgd optimizer.nesterov=true optimizer.momentum=0"),
    ),
    Rule(
        "adafactor-sees-whole-matrices",
        "optimizer=adafactor needs unsharded tensors on every rank",
        lambda c, w: c.optimizer.name == "adafactor" and c.strategy.name not in ("single", "ddp"),
        lambda c, w: (
            "optimizer=adafactor keeps sums over the rows and columns of full matrices, but "
            f"strategy={c.strategy.name} gives it shards, whose sums differ"
        ),
        lambda c, w: "strategy=ddp, or optimizer=adamw_8bit strategy=fsdp, or optimizer=adamw",
        Example("optimizer=adafactor strategy=fsdp"),
    ),
    Rule(
        "8bit-needs-tensors",
        "optimizer=adamw_8bit does not run under DeepSpeed",
        lambda c, w: c.optimizer.name == "adamw_8bit" and isinstance(c.strategy, ZeroConfig),
        lambda c, w: (
            f"optimizer=adamw_8bit quantizes each tensor in blocks, but strategy={c.strategy.name} "
            "gives it a flat range of many tensors, where a block would mix different magnitudes"
        ),
        lambda c, w: "strategy=fsdp, or optimizer=adamw",
        Example("optimizer=adamw_8bit strategy=zero2"),
    ),
    Rule(
        "paging-needs-a-gpu",
        "optimizer=adamw_paged needs a GPU",
        lambda c, w: c.optimizer.name == "adamw_paged" and w.gpus == 0,
        lambda c, w: (
            "optimizer=adamw_paged moves its state between GPU and host memory, and no GPU is "
            "visible"
        ),
        lambda c, w: "optimizer=adamw, or optimizer=adamw_8bit",
        Example("optimizer=adamw_paged", Machine(gpus=0)),
    ),
    Rule(
        "activation-checkpointing-is-known",
        "training.activation_checkpointing is off, full or a number of layers",
        _unknown_activation_checkpointing,
        lambda c, w: (
            f"training.activation_checkpointing={c.training.activation_checkpointing} must be "
            "off, full or N (the first of every N layers)"
        ),
        lambda c, w: "training.activation_checkpointing=full",
        Example("training.activation_checkpointing=some"),
    ),
    Rule(
        "router-aux-loss-is-known",
        "training.router_aux_loss is off, model or a coefficient",
        _unknown_router_aux_loss,
        lambda c, w: (
            f"training.router_aux_loss={c.training.router_aux_loss} must be off, model (the "
            "coefficient of the model's config.json) or a number, such as 0.001"
        ),
        lambda c, w: "training.router_aux_loss=model",
        Example("training.router_aux_loss=on"),
    ),
)
