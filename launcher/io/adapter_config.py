"""The settings of adapter_config.json that change the arithmetic, and which of them are
supported."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.io.adapter import PREFIX, Adapter
from launcher.io.tensor import Tensor

SUPPORTED_INITS = ("gaussian", "eva", "orthogonal", "mica")  # they leave the base unchanged
# They begin with factors of the base, and train on the rest of it.
INITS_FROM_BASE = ("pissa", "olora", "corda", "lora_ga")
# Kinds of adapters that no weights of the model can express → why.
NOT_WEIGHTS = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
        "it adds trained vectors before each prompt, and changes no weight of the model",
    ),
    "CARTRIDGE": "it adds trained keys and values before each prompt, and changes no weight",
    "ADAPTION_PROMPT": "it adds trained prompts inside the attention layers, and changes no weight",
    "XLORA": "X-LoRA weighs several LoRA adapters for each token, which no fixed weight does",
}
REFUSED_KEYS = {  # key → what it is, and why its weights are not base + delta
    "megatron_config": "layers of Megatron, a module that PEFT imports by its name",
    "alora_invocation_tokens": "activated LoRA, which is active only after its invocation tokens",
    "arrow_config": "Arrow, which selects among adapters for every token",
    "layer_replication": "layer replication, whose layers are not the layers of the base",
    "use_qalora": "QALoRA, whose delta belongs to a GPTQ-quantized base",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which truncates the weights of the base when it is loaded",
    "velora_config": "VeLoRA, which this tool cannot merge",
    "monteclora_config": "MonteCLoRA, whose factors are random samples",
}
USUAL_RANK = 4096  # higher ones are looked for in the tensors
MERGE_WITH_PEFT = (
    "merge it with PEFT and consolidate the result → peft.AutoPeftModelForCausalLM"
    '.from_pretrained(ADAPTER, dtype="auto").merge_and_unload().save_pretrained(MODEL)'
)
PROMPT = ".prompt_encoder."  # in the names of a trained prompt
# In the names of tensors that begin as LoRA's → the method.
OTHER_PARTS = {
    **dict.fromkeys((".lora_E", ".ranknum"), "ADALORA"),
    ".trainable_tokens_delta": "TRAINABLE_TOKENS",
}
READ_METHODS = ("LORA", "ADALORA", "TRAINABLE_TOKENS")  # by the prefix of their tensors: lora_ …
KNOWN_KEYS = {  # keys that are read, or that do not change the arithmetic of merging
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "use_dora", "qalora_group_size", "runtime_config", "lora_bias", "target_parameters",
    "ensure_weight_tying", *REFUSED_KEYS,
}  # fmt: skip


def check_expressible(file: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for an adapter that no weights of the model can express. `file`: its
    adapter_config.json."""
    peft_type = config.get("peft_type")
    if peft_type in NOT_WEIGHTS:
        raise UserError(
            f"{file} has peft_type={peft_type}: {NOT_WEIGHTS[peft_type]} → serve it with PEFT, as "
            "an adapter"
        )


def check_mergeable(adapter: Adapter) -> None:
    """Raises UserError unless the adapter adds low-rank deltas to its base."""
    config, file = adapter.config, adapter.origin / "adapter_config.json"
    check_expressible(file, config)
    if (peft_type := config.get("peft_type")) != "LORA":
        raise UserError(
            f"{file} has peft_type={peft_type!r}; only LORA is supported, so {MERGE_WITH_PEFT}"
        )
    if missing := {"r", "lora_alpha"} - config.keys():
        raise UserError(f"{file} lacks {', '.join(sorted(missing))}; save the adapter again")
    if missing := {key for key in ("r", "lora_alpha") if config[key] is None}:
        raise UserError(f"{file} has no {', '.join(sorted(missing))}; save the adapter again")
    _check_ranks(adapter)
    for key, description in REFUSED_KEYS.items():
        if config.get(key):
            raise UserError(f"{file} sets {key}: {description}; {MERGE_WITH_PEFT}")
    init = config.get("init_lora_weights")
    if has_initial_factors(config):
        name = str(init).partition("_niter_")[0].lower()
        random = " (at random: they cannot be computed again)" if "_niter_" in str(init) else ""
        raise UserError(
            f"{file} has init_lora_weights={init!r}: training took its first factors out of the "
            f"base{random}, and they are not beside it → put the adapter that was saved before "
            f"training there, as {name}_init, or save this one with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if isinstance(init, str) and init.lower().startswith("loftq"):
        raise UserError(
            f"{file} has init_lora_weights={init!r}: its deltas belong to a base that was "
            "quantized and changed when training started; save that base, and set "
            "init_lora_weights=true"
        )
    if isinstance(init, str) and init.lower() not in SUPPORTED_INITS:
        raise UserError(
            f"{file} has init_lora_weights={init!r}, which is not known; {MERGE_WITH_PEFT}"
        )
    if unknown := sorted(key for key in config.keys() - KNOWN_KEYS if config[key]):
        raise UserError(
            f"{file} sets {', '.join(unknown)}, which this tool does not know and which may change "
            f"the merged weights; {MERGE_WITH_PEFT}"
        )


def check_only_lora(folder: Path, names: Collection[str]) -> None:
    """Raises UserError if the state of a PEFT model has the tensors of another method: without its
    formula they would be left unmerged. `folder`: for the message."""
    if prompts := [name for name in names if PROMPT in f".{name}"]:
        raise UserError(
            f"{folder} contains {min(prompts)}, a trained prompt (prompt tuning, prefix tuning, "
            "P-tuning): it changes no weight of the model → save it with PEFT's "
            "save_pretrained, and serve it with PEFT"
        )
    if not any(f".{PREFIX}" in f".{name}" or ".base_layer." in name for name in names):
        return
    has_lora = any(re.search(r"\.lora_(embedding_)?A", name) for name in names)
    for part, method in OTHER_PARTS.items():
        found = sorted(name for name in names if part in name)
        if found and not (has_lora and method == "TRAINABLE_TOKENS"):
            raise _unmerged(folder, found[0], method)
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = {
        prefix: method.value
        for method, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()
        if method.value not in READ_METHODS
    }
    for name, prefix in itertools.product(sorted(names), prefixes):
        if f".{prefix}" in f".{name}":
            raise _unmerged(folder, name, prefixes[prefix])


def _unmerged(folder: Path, name: str, method: str) -> UserError:
    return UserError(
        f"{folder} contains {name}, of an adapter with peft_type={method!r}; only LORA is "
        "supported → model.merge_and_unload().save_pretrained(MODEL) in the program that trained it"
    )


def has_initial_factors(config: Mapping[str, Any]) -> bool:
    """Whether training took the factors that it began with out of the base."""
    return str(config.get("init_lora_weights")).lower().startswith(INITS_FROM_BASE)


def _check_ranks(adapter: Adapter) -> None:
    """Raises UserError for a rank far beyond that of all tensors: PEFT makes factors of that rank
    before it reads the tensors."""
    config = adapter.config
    highest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    stored = [size for tensor in adapter.tensors.values() for size in tensor.shape]
    if highest > max(USUAL_RANK, *stored, 0):
        raise UserError(
            f"{adapter.origin / 'adapter_config.json'} has the rank {highest}, and no tensor of "
            "the adapter has a dim of that size; use the config that was saved with these weights"
        )


def inferred_settings(origin: Path, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Any]:
    """adapter_config.json of an adapter that has none: of its tensors, by their names in PEFT's
    files, and its alpha. The scale is alpha / rank. `origin`: for messages.

    Raises UserError for settings that do not follow from names and shapes.
    """
    ranks: dict[str, int] = {}
    saved = []
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if part in ("A.weight", "embedding_A"):
            ranks[module] = tensor.shape[0]
        elif not part:
            saved.append(name.removeprefix(PREFIX).rpartition(".")[0])
    hidden = next((m for m in ranks if m.endswith(("experts", ".base_layer"))), None)
    hidden = next((name for name in saved if name.endswith("token_adapter")), hidden)
    if hidden is not None or not ranks:
        raise UserError(
            f"{origin}: the settings of {hidden or 'the adapter'} do not follow from its shapes → "
            "copy adapter_config.json from the training to that folder"
        )
    general = max({*ranks.values()}, key=[*ranks.values()].count)
    patterns = {re.escape(module): rank for module, rank in ranks.items() if rank != general}
    return {
        "peft_type": "LORA",
        "r": general,
        "lora_alpha": alpha,
        "rank_pattern": patterns,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "use_dora": any("lora_magnitude_vector" in name for name in tensors),
        "lora_bias": any(name.endswith("lora_B.bias") for name in tensors),
        "bias": "none",
    }


def rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """The rank and scale of the module with this path: of the pattern that matches the end of the
    path, or the general setting.

    The scale is alpha / r, or alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732). Raises
    UserError if the rank is not at least 1.
    """
    rank = module_value(config, "rank_pattern", module, config["r"])
    alpha = module_value(config, "alpha_pattern", module, config["lora_alpha"])
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"adapter_config.json gives {module} rank {rank!r}; it must be at least 1")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_saved(config: dict[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names this module: PEFT then trains a copy of its weights."""
    return any(module.endswith(name) for name in config.get("modules_to_save") or ())


def module_value(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the path, as in PEFT
    (utils/other.py, get_pattern_key)."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
