"""What adapter_config.json says of the arithmetic, and what of it this tool knows."""

from __future__ import annotations

import math
import re
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.adapter import Adapter

INITS = ("gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it is
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
REFUSED = {  # key → what it is, and why its weights are not base + delta
    "alora_invocation_tokens": "activated LoRA, which acts only after its invocation tokens",
    "arrow_config": "Arrow, which chooses among adapters for every token",
    "layer_replication": "layer replication, whose layers are not the base's",
    "use_qalora": "QALoRA, whose delta belongs to a GPTQ-quantised base",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which truncates the base's weights when it is loaded",
    "velora_config": "VeLoRA, which this tool does not know how to merge",
    "monteclora_config": "MonteCLoRA, whose factors are random samples",
}
WAY_OUT = "merge it with PEFT and consolidate the result"
KNOWN = {  # keys that are read, or that do not alter the arithmetic of merging
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config", "lora_bias",
    "target_parameters", "ensure_weight_tying", *REFUSED,
}  # fmt: skip


def check(adapter: Adapter) -> None:
    """Raises UserError when the adapter is not one that adds low-rank deltas to its base."""
    config, file = adapter.config, adapter.origin / "adapter_config.json"
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{file} has peft_type={kind!r}; only LORA is merged, so {WAY_OUT}")
    if lost := {"r", "lora_alpha"} - config.keys():
        raise UserError(f"{file} does not say {', '.join(sorted(lost))}; save the adapter again")
    for key, what in REFUSED.items():
        if config.get(key):
            raise UserError(f"{file} sets {key}: {what}; {WAY_OUT}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MUTATING):
        raise UserError(
            f"{file} has init_lora_weights={init!r}: its deltas belong to a base that was changed "
            "when training began; save it with path_initial_model_for_weight_conversion"
        )
    if isinstance(init, str) and init.lower() not in INITS:
        raise UserError(f"{file} has init_lora_weights={init!r}, which is not known; {WAY_OUT}")
    if unknown := sorted(key for key in config.keys() - KNOWN if config[key]):
        raise UserError(
            f"{file} sets {', '.join(unknown)}, which this tool does not know and which may alter "
            f"the merged weights; {WAY_OUT}"
        )


def rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Of the module with this path: the pattern that matches its end, or the general setting.

    alpha / r, or alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732).
    """
    rank = _of_module(config, "rank_pattern", module, config["r"])
    alpha = _of_module(config, "alpha_pattern", module, config["lora_alpha"])
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"adapter_config.json gives {module} rank {rank!r}; it is at least 1")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_saved(config: dict[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names this module: PEFT then gave it weights of its own."""
    return any(module.endswith(each) for each in config.get("modules_to_save") or ())


def _of_module(config: dict[str, Any], pattern: str, module: str, default: Any) -> Any:
    """PEFT's rule (utils/other.py, get_pattern_key): the first that matches the path's end."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
