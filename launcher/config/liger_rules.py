"""The rules of `training.loss=liger` and `training.kernels=liger`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rule import Example, Rule, World

INSTEAD = {"training.loss=liger": "training.loss=chunked"}
INSTEAD |= {"training.kernels=liger": "training.kernels=torch"}


def _asked(config: Config) -> list[str]:
    """Which of both, as overrides."""
    training = config.training
    chosen = (f"training.loss={training.loss}", f"training.kernels={training.kernels}")
    return [override for override in chosen if override in INSTEAD]


def _instead(config: Config) -> str:
    return " ".join(INSTEAD[override] for override in _asked(config))


def _can_run(world: World) -> bool:
    return world.gpus > 0 or world.interpreter


LIGER_RULES: tuple[Rule, ...] = (
    Rule(
        "liger-needs-a-gpu",
        "training.loss=liger and training.kernels=liger run on GPUs",
        lambda c, w: bool(_asked(c)) and not _can_run(w),
        lambda c, w: (
            f"{' and '.join(_asked(c))}: Liger's Triton kernels run on GPUs, and none can be seen"
        ),
        lambda c, w: _instead(c),
        Example("training.loss=liger training.kernels=liger", gpus=0),
    ),
    Rule(
        "liger-is-installed",
        "training.loss=liger and training.kernels=liger come with the package liger-kernel",
        lambda c, w: bool(_asked(c)) and _can_run(w) and not w.liger,
        lambda c, w: (
            f"{' and '.join(_asked(c))}: the packages liger-kernel and triton are not both "
            "installed"
        ),
        lambda c, w: f"{_instead(c)}, or pip install 'shardway[liger]'",
        Example("training.kernels=liger", gpus=1),
    ),
    Rule(
        "liger-loss-without-fp16",
        "training.loss=liger computes in fp32 or bf16",
        lambda c, w: c.training.loss == "liger" and c.precision.name == "fp16",
        lambda c, w: (
            "training.loss=liger with precision=fp16: Liger computes gradients before the loss is "
            "scaled, and in fp16 small ones are lost by then"
        ),
        lambda c, w: "training.loss=chunked, or precision=bf16",
        Example("training.loss=liger precision=fp16", gpus=1, liger=True),
    ),
    Rule(
        "liger-kernels-are-not-compiled",
        "training.kernels=liger is used without training.compile",
        lambda c, w: c.training.kernels == "liger" and c.training.compile != "off",
        lambda c, w: (
            f"training.kernels=liger with training.compile={c.training.compile}: compiling fuses "
            "the same operations by itself, and both together are untried"
        ),
        lambda c, w: "training.kernels=torch, or training.compile=off",
        Example("training.kernels=liger training.compile=on", gpus=1, liger=True),
    ),
)
