"""The rules of state in host memory or on disk: `strategy=fsdp_offload` and its siblings."""

from __future__ import annotations

from pathlib import Path

from launcher.config import Config
from launcher.config.rule import Example, Rule, World
from launcher.config.strategy import Zero3Config, ZeroConfig

ON_DISK = "strategy=zero3 strategy.offload_param=nvme"


def _rounds_masters(config: Config, world: World) -> bool:
    strategy = config.strategy
    offloads = isinstance(strategy, ZeroConfig) and strategy.steps_on_cpu
    return offloads and config.precision.name == "pure_bf16"


def _folder(config: Config) -> str:
    named = config.strategy.nvme_path if isinstance(config.strategy, Zero3Config) else None
    return named or "null"


OFFLOAD_RULES: tuple[Rule, ...] = (
    Rule(
        "zero-offload-keeps-fp32",
        "strategy.offload_optimizer=cpu keeps masters in fp32",
        _rounds_masters,
        lambda c, w: (
            f"precision=pure_bf16 with strategy={c.strategy.name}: DeepSpeed offloads bf16 masters "
            "to an optimizer of its own alone, which would have to be compiled"
        ),
        lambda c, w: "precision=bf16, or strategy=fsdp_offload",
        Example("strategy=zero2_offload precision=pure_bf16"),
    ),
    Rule(
        "offload-pages-nothing",
        "optimizer=adamw_paged is not used where the optimizer state is in host memory",
        lambda c, w: c.optimizer.name == "adamw_paged" and c.strategy.steps_on_cpu and w.gpus > 0,
        lambda c, w: (
            "optimizer=adamw_paged moves its state between GPU and host memory, and "
            f"strategy={c.strategy.name} with offload keeps it in host memory"
        ),
        lambda c, w: "optimizer=adamw, or strategy=fsdp",
        Example("strategy=fsdp_offload optimizer=adamw_paged", gpus=2),
    ),
    Rule(
        "nvme-has-a-folder",
        "strategy.offload_param=nvme comes with a folder on a local disk",
        lambda c, w: c.strategy.on_disk and not Path(_folder(c)).is_dir(),
        lambda c, w: (
            f"strategy.offload_param=nvme keeps parameters in strategy.nvme_path={_folder(c)}, "
            "which is no folder on this machine"
        ),
        lambda c, w: "strategy.nvme_path=FOLDER, or strategy.offload_param=cpu",
        Example(ON_DISK),
    ),
    Rule(
        "nvme-needs-libaio",
        "strategy.offload_param=nvme finds libaio and a C++ compiler",
        lambda c, w: c.strategy.on_disk and not w.libaio,
        lambda c, w: (
            "strategy.offload_param=nvme: DeepSpeed compiles its disk access against libaio, and "
            "libaio.h, the library or a C++ compiler is missing"
        ),
        lambda c, w: (
            "strategy.offload_param=cpu, or install libaio-dev (Fedora, RHEL: libaio-devel) and g++"
        ),
        Example(f"{ON_DISK} strategy.nvme_path=.", libaio=False),
    ),
    Rule(
        "nvme-holds-one-dtype",
        "strategy.offload_param=nvme is used with weights that are not quantised",
        lambda c, w: c.strategy.on_disk and c.method.name == "qlora",
        lambda c, w: (
            "method=qlora with strategy.offload_param=nvme: DeepSpeed's buffers for the disk have "
            "one dtype, and quantised weights another"
        ),
        lambda c, w: "strategy.offload_param=cpu, or method=lora",
        Example(f"{ON_DISK} strategy.nvme_path=. method=qlora"),
    ),
)
