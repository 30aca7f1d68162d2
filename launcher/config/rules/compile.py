"""The rules of `training.compile`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World
from launcher.config.schema.strategy import ZeroConfig


def _uses_compile(config: Config) -> bool:
    return config.training.compile != "off"


def _zero_stage(config: Config) -> int:
    return config.strategy.stage if isinstance(config.strategy, ZeroConfig) else 0


def _is_auto_under_zero(config: Config, world: World) -> bool:
    return config.training.compile == "auto" and _zero_stage(config) in (1, 2)


COMPILE_RULES: tuple[Rule, ...] = (
    Rule(
        "compile-without-zero3",
        "training.compile is not used with zero3",
        lambda c, w: _uses_compile(c) and _zero_stage(c) == 3,
        lambda c, w: (
            f"training.compile={c.training.compile} with strategy={c.strategy.name}: DeepSpeed "
            "gathers weights module by module inside a layer, so the layer cannot be compiled"
        ),
        lambda c, w: "training.compile=off, or strategy=fsdp",
        Example("training.compile=on strategy=zero3"),
    ),
    Rule(
        "compile-tries-without-deepspeed",
        "training.compile=auto is not used with the strategies of DeepSpeed",
        _is_auto_under_zero,
        lambda c, w: (
            f"training.compile=auto with strategy={c.strategy.name}: auto tries both variants on a "
            "micro-batch, and DeepSpeed would add the gradients of that trial to the first step"
        ),
        lambda c, w: "training.compile=on, or training.compile=off",
        Example("training.compile=auto strategy=zero2"),
    ),
    Rule(
        "compile-without-packing-on-cpu",
        "training.compile is not used with data.packing on CPU",
        lambda c, w: _uses_compile(c) and w.gpus == 0 and c.data.packing,
        lambda c, w: (
            f"training.compile={c.training.compile} with data.packing=true on CPU: attention runs "
            "document by document there and would be compiled again for every micro-batch"
        ),
        lambda c, w: "training.compile=off, or data.packing=false",
        Example("training.compile=on data.packing=true", Machine(gpus=0)),
    ),
    Rule(
        "compile-needs-a-compiler",
        "training.compile on CPU needs a C++ compiler",
        lambda c, w: _uses_compile(c) and w.gpus == 0 and not w.machine.compiler,
        lambda c, w: (
            f"training.compile={c.training.compile} on CPU: torch generates C++, but neither g++ "
            "nor the compiler in CXX was found"
        ),
        lambda c, w: "training.compile=off, or install g++",
        Example("training.compile=on", Machine(compiler=False)),
    ),
)
