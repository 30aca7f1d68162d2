"""Generate the DeepSpeed JSON from the configuration. Imports no torch and no deepspeed.

Keys: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config import store
from launcher.config.schema.precision import Fp16Config, PrecisionConfig
from launcher.config.schema.strategy import Zero2Config, Zero3Config, ZeroConfig
from launcher.config.schema.training import TrainingConfig

# Sections of DeepSpeed's configuration → the setting of Shardway that controls them.
MANAGED_SECTIONS = {
    "optimizer": "optimizer=",
    "scheduler": "scheduler=",
    "amp": "precision=",
    "torch_autocast": "precision=",
    "checkpoint": "checkpoint.save_steps",
}


def engine_config(
    strategy: ZeroConfig, training: TrainingConfig, precision: PrecisionConfig, world_size: int
) -> dict[str, Any]:
    """The configuration for DeepSpeed, with `strategy.extra` merged in.

    `contradictions` must have found nothing in `strategy.extra`.
    """
    return _merge(_generated(strategy, training, precision, world_size), strategy.extra)


def contradictions(
    strategy: ZeroConfig, training: TrainingConfig, precision: PrecisionConfig, world_size: int
) -> list[str]:
    """One message for each key of `strategy.extra` that contradicts the configuration."""
    generated = dict(store.leaves_of(_generated(strategy, training, precision, world_size)))
    problems = [
        f"strategy.extra.{key} is managed by Shardway; set {MANAGED_SECTIONS[key]}…"
        for key in strategy.extra
        if key in MANAGED_SECTIONS
    ]
    for key, value in store.leaves_of(strategy.extra):
        if key in generated and generated[key] != value:
            problems.append(f"strategy.extra.{key}={value} contradicts {key}={generated[key]}")
        elif any(known.startswith(f"{key}.") for known in generated):
            problems.append(
                f"strategy.extra.{key}={value} replaces a section; set single keys in it"
            )
    return problems


def _generated(
    strategy: ZeroConfig, training: TrainingConfig, precision: PrecisionConfig, world_size: int
) -> dict[str, Any]:
    micro_batch_rows = training.micro_batch_size * world_size
    zero: dict[str, Any] = {
        "stage": strategy.stage,
        "contiguous_gradients": True,
        "overlap_comm": isinstance(strategy, Zero2Config) and strategy.overlap_comm,
        "reduce_bucket_size": strategy.reduce_bucket_size,
        # With round robin DeepSpeed's own map from parameters to partitions is wrong.
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
            zero |= _nvme_keys(strategy)
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // micro_batch_rows,
        # The training loop ends a step: the last one of an epoch may have fewer micro-batches.
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # tests/distributed/test_optimizers.py tests them
        # torch's AdamW is as fast on the CPU as DeepSpeed's, which would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **_precision_keys(precision),
    }


def _nvme_keys(strategy: Zero3Config) -> dict[str, Any]:
    """Keys for parameters on an NVMe disk.

    A tensor in use occupies one of five buffers, so it is freed immediately after use. Prefetching
    is off: DeepSpeed would request a buffer for a tensor that already has one.
    """
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


def _precision_keys(precision: PrecisionConfig) -> dict[str, Any]:
    """Keys for the dtypes. As under every strategy, gradients are summed in fp32 except under
    pure_bf16."""
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


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `extra`, at any depth."""
    merged = dict(base)
    for key, value in extra.items():
        current = merged[key] if key in merged else None
        nested = isinstance(current, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(current, value) if nested else value  # type: ignore[arg-type]
    return merged
