"""The DeepSpeed JSON, generated from the one configuration. Imports no torch, no deepspeed.

Keys: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config import store
from launcher.config.precision import Fp16Config, PrecisionConfig
from launcher.config.strategy import Zero2Config, Zero3Config, ZeroConfig
from launcher.config.training import TrainingConfig

# Sections of DeepSpeed's that another setting of ours stands for.
OURS = {
    "optimizer": "optimizer=",
    "scheduler": "scheduler=",
    "amp": "precision=",
    "torch_autocast": "precision=",
    "checkpoint": "checkpoint.save_steps",
}


def engine_config(
    strategy: ZeroConfig, training: TrainingConfig, precision: PrecisionConfig, world_size: int
) -> dict[str, Any]:
    """What DeepSpeed is told. `strategy.extra` is merged in; it must not contradict (see below)."""
    return _merge(_generated(strategy, training, precision, world_size), strategy.extra)


def contradictions(
    strategy: ZeroConfig, training: TrainingConfig, precision: PrecisionConfig, world_size: int
) -> list[str]:
    """One sentence for each key of `strategy.extra` that says otherwise than the configuration."""
    generated = dict(store.leaves_of(_generated(strategy, training, precision, world_size)))
    problems = [
        f"strategy.extra.{key} is not DeepSpeed's to decide; say {OURS[key]}…"
        for key in strategy.extra
        if key in OURS
    ]
    for key, value in store.leaves_of(strategy.extra):
        if key in generated and generated[key] != value:
            problems.append(f"strategy.extra.{key}={value} contradicts {key}={generated[key]}")
        elif any(known.startswith(f"{key}.") for known in generated):
            problems.append(f"strategy.extra.{key}={value} replaces a section; name keys in it")
    return problems


def _generated(
    strategy: ZeroConfig, training: TrainingConfig, precision: PrecisionConfig, world_size: int
) -> dict[str, Any]:
    per_round = training.micro_batch_size * world_size
    zero: dict[str, Any] = {
        "stage": strategy.stage,
        "contiguous_gradients": True,
        "overlap_comm": isinstance(strategy, Zero2Config) and strategy.overlap_comm,
        "reduce_bucket_size": strategy.reduce_bucket_size,
        # Under round robin DeepSpeed's own map of parameters to partitions is wrong.
        "round_robin_gradients": False,
        "offload_optimizer": {"device": "cpu" if strategy.steps_on_cpu else "none"},
    }
    if isinstance(strategy, Zero3Config):
        zero |= {
            "offload_param": {"device": strategy.offload_param},
            "stage3_prefetch_bucket_size": strategy.prefetch_bucket_size,
            "stage3_param_persistence_threshold": strategy.persistence_threshold,
        }
        if strategy.on_disk:
            zero |= _swapping(strategy)
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // per_round,
        # The loop says when a step ends: the last one of an epoch may take fewer micro-batches.
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # tests/distributed/test_optimizers.py tests them
        # torch's AdamW steps on the CPU as fast as DeepSpeed's, which is compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **_arithmetic(precision),
    }


def _swapping(strategy: Zero3Config) -> dict[str, Any]:
    """Parameters on disk. A tensor that is in use holds one of five buffers, so it is freed at
    once; DeepSpeed's reading ahead asks for a buffer that the tensor has already."""
    return {
        "offload_param": {
            "device": "nvme",
            "nvme_path": strategy.nvme_path,
            "buffer_size": strategy.nvme_buffer_size,
            "max_in_cpu": 0,
        },
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }


def _arithmetic(precision: PrecisionConfig) -> dict[str, Any]:
    """Sums of gradients in fp32 but under pure_bf16, as under every strategy."""
    sections: dict[str, Any] = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    if isinstance(precision, Fp16Config):
        sections["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.growth_window,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": precision.minimum_scale,
        }
    elif precision.name == "bf16":
        sections["bf16"] = {"enabled": True}
    elif precision.name == "pure_bf16":
        sections["bf16"] = {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        }
    if precision.name in ("bf16", "fp16"):
        sections |= {
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return sections


def _merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        below = merged[key] if key in merged else None
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
