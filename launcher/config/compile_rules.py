"""The rules of `training.compile`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rule import Example, Rule, World
from launcher.config.strategy import ZeroConfig


def _compiles(config: Config) -> bool:
    return config.training.compile != "off"


def _stage(config: Config) -> int:
    return config.strategy.stage if isinstance(config.strategy, ZeroConfig) else 0


def _tries_under_deepspeed(config: Config, world: World) -> bool:
    return config.training.compile == "auto" and _stage(config) in (1, 2)


COMPILE_RULES: tuple[Rule, ...] = (
    Rule(
        "compile-without-zero3",
        "training.compile is used with strategies other than zero3",
        lambda c, w: _compiles(c) and _stage(c) == 3,
        lambda c, w: (
            f"training.compile={c.training.compile} with strategy={c.strategy.name}: DeepSpeed "
            "gathers weights module by module inside a layer, which cannot be compiled as one"
        ),
        lambda c, w: "training.compile=off, or strategy=fsdp",
        Example("training.compile=on strategy=zero3"),
    ),
    Rule(
        "compile-tries-without-deepspeed",
        "training.compile=auto is used with strategies other than DeepSpeed's",
        _tries_under_deepspeed,
        lambda c, w: (
            f"training.compile=auto with strategy={c.strategy.name}: it tries both on a "
            "micro-batch, whose gradients DeepSpeed would add to the first step"
        ),
        lambda c, w: "training.compile=on, or training.compile=off",
        Example("training.compile=auto strategy=zero2"),
    ),
    Rule(
        "compile-without-packing-on-cpu",
        "training.compile on CPU is used without data.packing",
        lambda c, w: _compiles(c) and w.gpus == 0 and c.data.packing,
        lambda c, w: (
            f"training.compile={c.training.compile} with data.packing=true on CPU: attention goes "
            "document by document there, and would be compiled anew for every micro-batch"
        ),
        lambda c, w: "training.compile=off, or data.packing=false",
        Example("training.compile=on data.packing=true", gpus=0),
    ),
    Rule(
        "compile-needs-a-compiler",
        "training.compile on CPU finds a C++ compiler",
        lambda c, w: _compiles(c) and w.gpus == 0 and not w.compiler,
        lambda c, w: (
            f"training.compile={c.training.compile} on CPU: torch generates C++, and there is "
            "neither g++ nor what CXX names"
        ),
        lambda c, w: "training.compile=off, or install g++",
        Example("training.compile=on", compiler=False),
    ),
)
