"""Schema of `optimizer=`: the optimizer and its hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.setting import setting


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """The settings of all optimizers."""

    name: str = setting(help="the optimizer")
    learning_rate: float = setting(1e-4, "peak learning rate", above=0)
    weight_decay: float = setting(
        0.0, "decoupled weight decay of matrices (not of norms and biases)", minimum=0
    )


@dataclass(kw_only=True, slots=True)
class AdamwConfig(OptimizerConfig):
    """Fused AdamW: two fp32 moments, 8 bytes per trained parameter."""

    name: str = setting("adamw", "the optimizer")
    betas: list[float] = setting(
        [0.9, 0.999], "decay rates of the two moments, each below 1", minimum=0
    )
    epsilon: float = setting(1e-8, "added to the denominator", above=0)


@dataclass(kw_only=True, slots=True)
class Adamw8bitConfig(AdamwConfig):
    """AdamW with both moments quantized to 8 bits in blocks (bitsandbytes): 2 bytes per trained
    parameter. Tensors with fewer than 4096 elements keep fp32 moments."""

    name: str = setting("adamw_8bit", "the optimizer")


@dataclass(kw_only=True, slots=True)
class AdamwPagedConfig(AdamwConfig):
    """AdamW with fp32 moments that move to host memory when the GPU is full (bitsandbytes)."""

    name: str = setting("adamw_paged", "the optimizer")


@dataclass(kw_only=True, slots=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (transformers) with the learning rate of the scheduler. Instead of a second moment
    it keeps one number per row and one per column of each matrix."""

    name: str = setting("adafactor", "the optimizer")
    scale_parameter: bool = setting(
        False, "scale updates by the size of the weights; use a learning rate near 1e-2"
    )
    clip_threshold: float = setting(1.0, "maximum root mean square of an update", above=0)
    decay_rate: float = setting(
        -0.8, "the decay rate of the second moment is 1 - step^decay_rate", maximum=0
    )


@dataclass(kw_only=True, slots=True)
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent: one fp32 moment, or none without momentum."""

    name: str = setting("sgd", "the optimizer")
    weight_decay: float = setting(
        0.0, "weight decay of matrices (not of norms and biases), added to the gradient", minimum=0
    )
    momentum: float = setting(
        0.9, "fraction of the last update that is added to the next one", minimum=0, maximum=1
    )
    nesterov: bool = setting(False, "use Nesterov momentum")


@dataclass(kw_only=True, slots=True)
class LionConfig(OptimizerConfig):
    """Lion (bitsandbytes): the sign of one fp32 moment. Use a tenth of AdamW's learning rate."""

    name: str = setting("lion", "the optimizer")
    betas: list[float] = setting(
        [0.9, 0.99],
        "weight of the moment in the update, and decay rate of the moment, each below 1",
        minimum=0,
    )


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamwConfig,
    "adamw_8bit": Adamw8bitConfig,
    "adamw_paged": AdamwPagedConfig,
    "adafactor": AdafactorConfig,
    "sgd": SgdConfig,
    "lion": LionConfig,
}
