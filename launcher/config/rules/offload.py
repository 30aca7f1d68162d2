"""The rules of train state in host memory or on disk, such as `strategy=fsdp_offload`."""

from __future__ import annotations

from pathlib import Path

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World
from launcher.config.schema.strategy import Zero3Config, ZeroConfig

ON_DISK = "strategy=zero3 strategy.offload_param=nvme"


def _offloads_bf16_masters(config: Config, world: World) -> bool:
    strategy = config.strategy
    offloads = isinstance(strategy, ZeroConfig) and strategy.steps_on_cpu
    return offloads and config.precision.name == "pure_bf16"


def _nvme_path(config: Config) -> str:
    path = config.strategy.nvme_path if isinstance(config.strategy, Zero3Config) else None
    return path or "null"


OFFLOAD_RULES: tuple[Rule, ...] = (
    Rule(
        "zero-offload-keeps-fp32",
        "strategy.offload_optimizer=cpu needs fp32 master weights",
        _offloads_bf16_masters,
        lambda c, w: (
            f"precision=pure_bf16 with strategy={c.strategy.name}: DeepSpeed offloads bf16 master "
            "weights only with its own optimizer, which would have to be compiled"
        ),
        lambda c, w: "precision=bf16, or strategy=fsdp_offload",
        Example("strategy=zero2_offload precision=pure_bf16"),
    ),
    Rule(
        "offload-pages-nothing",
        "optimizer=adamw_paged is not used if the optimizer state is in host memory",
        lambda c, w: c.optimizer.name == "adamw_paged" and c.strategy.steps_on_cpu and w.gpus > 0,
        lambda c, w: (
            "optimizer=adamw_paged moves its state between GPU and host memory, but "
            f"strategy={c.strategy.name} with offload keeps it in host memory"
        ),
        lambda c, w: "optimizer=adamw, or strategy=fsdp",
        Example("strategy=fsdp_offload optimizer=adamw_paged", Machine(gpus=2)),
    ),
    Rule(
        "nvme-has-a-folder",
        "strategy.offload_param=nvme needs a folder on a local disk",
        lambda c, w: c.strategy.on_disk and not Path(_nvme_path(c)).is_dir(),
        lambda c, w: (
            f"strategy.offload_param=nvme keeps parameters in strategy.nvme_path={_nvme_path(c)}, "
            "which is not a folder on this machine"
        ),
        lambda c, w: "strategy.nvme_path=FOLDER, or strategy.offload_param=cpu",
        Example(ON_DISK),
    ),
    Rule(
        "nvme-needs-libaio",
        "strategy.offload_param=nvme needs libaio and a C++ compiler",
        lambda c, w: c.strategy.on_disk and not w.machine.libaio,
        lambda c, w: (
            "strategy.offload_param=nvme: DeepSpeed compiles its disk access with libaio, but "
            "libaio.h, the library or a C++ compiler is missing"
        ),
        lambda c, w: (
            "strategy.offload_param=cpu, or install libaio-dev (Fedora, RHEL: libaio-devel) and g++"
        ),
        Example(f"{ON_DISK} strategy.nvme_path=.", Machine(libaio=False)),
    ),
    Rule(
        "nvme-holds-one-dtype",
        "strategy.offload_param=nvme is not used with quantized weights",
        lambda c, w: c.strategy.on_disk and c.method.name == "qlora",
        lambda c, w: (
            "method=qlora with strategy.offload_param=nvme: DeepSpeed's disk buffers have one "
            "dtype, but quantized weights have another"
        ),
        lambda c, w: "strategy.offload_param=cpu, or method=lora",
        Example(f"{ON_DISK} strategy.nvme_path=. method=qlora"),
    ),
)
