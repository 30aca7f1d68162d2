"""Schema of `optimizer=`: how a gradient becomes a step."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    name: str = setting(help="the optimizer")
    learning_rate: float = setting(1e-4, "peak learning rate", above=0)
    weight_decay: float = setting(0.0, "decoupled decay of matrices (not norms, biases)", minimum=0)


@dataclass(kw_only=True, slots=True)
class AdamwConfig(OptimizerConfig):
    """Fused AdamW: two fp32 moments, 8 bytes a trained parameter."""

    name: str = setting("adamw", "the optimizer")
    betas: list[float] = setting([0.9, 0.999], "decay of the two moments, each below 1", minimum=0)
    epsilon: float = setting(1e-8, "added to the denominator", above=0)


@dataclass(kw_only=True, slots=True)
class Adamw8bitConfig(AdamwConfig):
    """AdamW with both moments in 8 bits, block by block (bitsandbytes): 2 bytes a trained
    parameter. Tensors of fewer than 4096 elements keep fp32 moments."""

    name: str = setting("adamw_8bit", "the optimizer")


@dataclass(kw_only=True, slots=True)
class AdamwPagedConfig(AdamwConfig):
    """AdamW with fp32 moments that move to host memory while the GPU is full (bitsandbytes)."""

    name: str = setting("adamw_paged", "the optimizer")


@dataclass(kw_only=True, slots=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (transformers) at the learning rate of the scheduler: one number a row and one a
    column of each matrix instead of a second moment."""

    name: str = setting("adafactor", "the optimizer")
    scale_parameter: bool = setting(
        False, "steps relative to the size of the weights; wants learning rates near 1e-2"
    )
    clip_threshold: float = setting(1.0, "an update's root mean square is at most this", above=0)
    decay_rate: float = setting(-0.8, "the second moment decays by 1 - step^this", maximum=0)


@dataclass(kw_only=True, slots=True)
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent: one fp32 moment, none without momentum."""

    name: str = setting("sgd", "the optimizer")
    weight_decay: float = setting(
        0.0, "decay of matrices (not norms, biases), part of the gradient", minimum=0
    )
    momentum: float = setting(0.9, "share of the last update in the next", minimum=0, maximum=1)
    nesterov: bool = setting(False, "look ahead along the momentum")


@dataclass(kw_only=True, slots=True)
class LionConfig(OptimizerConfig):
    """Lion (bitsandbytes): the sign of one fp32 moment; wants about a tenth of AdamW's rate."""

    name: str = setting("lion", "the optimizer")
    betas: list[float] = setting(
        [0.9, 0.99], "share of the moment in the update, and its decay, each below 1", minimum=0
    )


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamwConfig,
    "adamw_8bit": Adamw8bitConfig,
    "adamw_paged": AdamwPagedConfig,
    "adafactor": AdafactorConfig,
    "sgd": SgdConfig,
    "lion": LionConfig,
}
