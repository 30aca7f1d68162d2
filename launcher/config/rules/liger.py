"""The rules of `training.loss=liger` and `training.kernels=liger`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World

REPLACEMENTS = {"training.loss=liger": "training.loss=chunked"}
REPLACEMENTS |= {"training.kernels=liger": "training.kernels=torch"}


def _liger_overrides(config: Config) -> list[str]:
    """The overrides that select Liger."""
    training = config.training
    overrides = (f"training.loss={training.loss}", f"training.kernels={training.kernels}")
    return [override for override in overrides if override in REPLACEMENTS]


def _replacements(config: Config) -> str:
    return " ".join(REPLACEMENTS[override] for override in _liger_overrides(config))


def _can_run(world: World) -> bool:
    return world.gpus > 0 or world.machine.triton_interpreter


LIGER_RULES: tuple[Rule, ...] = (
    Rule(
        "liger-needs-a-gpu",
        "training.loss=liger and training.kernels=liger need a GPU",
        lambda c, w: bool(_liger_overrides(c)) and not _can_run(w),
        lambda c, w: (
            f"{' and '.join(_liger_overrides(c))}: Liger's Triton kernels need a GPU, and no GPU "
            "is visible"
        ),
        lambda c, w: _replacements(c),
        Example("training.loss=liger training.kernels=liger", Machine(gpus=0)),
    ),
    Rule(
        "liger-is-installed",
        "training.loss=liger and training.kernels=liger need the package liger-kernel",
        lambda c, w: bool(_liger_overrides(c)) and _can_run(w) and not w.machine.liger,
        lambda c, w: (
            f"{' and '.join(_liger_overrides(c))}: the packages liger-kernel and triton are not "
            "both installed"
        ),
        lambda c, w: f"{_replacements(c)}, or pip install 'shardway[liger]'",
        Example("training.kernels=liger", Machine(gpus=1)),
    ),
    Rule(
        "liger-loss-without-fp16",
        "training.loss=liger computes in fp32 or bf16",
        lambda c, w: c.training.loss == "liger" and c.precision.name == "fp16",
        lambda c, w: (
            "training.loss=liger with precision=fp16: Liger computes gradients before the loss is "
            "scaled, so small gradients become zero in fp16"
        ),
        lambda c, w: "training.loss=chunked, or precision=bf16",
        Example("training.loss=liger precision=fp16", Machine(gpus=1, liger=True)),
    ),
    Rule(
        "liger-kernels-are-not-compiled",
        "training.kernels=liger is not used with training.compile",
        lambda c, w: c.training.kernels == "liger" and c.training.compile != "off",
        lambda c, w: (
            f"training.kernels=liger with training.compile={c.training.compile}: torch.compile "
            "fuses the same operations itself, and the combination is not tested"
        ),
        lambda c, w: "training.kernels=torch, or training.compile=off",
        Example("training.kernels=liger training.compile=on", Machine(gpus=1, liger=True)),
    ),
)
