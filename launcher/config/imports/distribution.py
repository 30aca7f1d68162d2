"""The strategy that a DeepSpeed JSON, accelerate's YAML or the `fsdp` of HF Trainer chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.config.imports.translation import Reader
from launcher.errors import UserError
from launcher.folders import regular

STAGES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
# Numbers of the JSON that are settings here; "auto" is Shardway's own default.
BUCKETS = {
    "reduce_bucket_size": "strategy.reduce_bucket_size",
    "stage3_prefetch_bucket_size": "strategy.prefetch_bucket_size",
    "stage3_param_persistence_threshold": "strategy.persistence_threshold",
}
UNSUPPORTED = {
    "tensor_parallel": "tensor parallelism is not built: shard with strategy=zero3 or fsdp",
    "autotp_size": "tensor parallelism is not built: shard with strategy=zero3 or fsdp",
    "optimizer": "the optimizer is chosen with optimizer=NAME",
    "scheduler": "the learning rate is chosen with scheduler=NAME",
    "fp8": "training in FP8 is not built: bf16",
}


def deepspeed(reader: Reader, key: str, folders: list[Path]) -> None:
    """Translate the DeepSpeed JSON that `key` names or holds."""
    stated = reader.take(key)
    content = stated if isinstance(stated, Mapping) else read_mapping(stated, folders)
    if content is None:
        reader.refuse(key, "the file is not there: name it with its folder, or choose strategy=…")
        return
    zero = content.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        reader.refuse(key, f"zero_optimization.stage is {stage}, which DeepSpeed does not have")
        return
    devices = {part: _device(zero, part) for part in ("offload_optimizer", "offload_param")}
    reader.add(f"strategy={STAGES[stage]}")
    if stage >= 2 and devices["offload_optimizer"] != "none":
        if devices["offload_optimizer"] != "cpu":
            reader.refuse(key, "the optimizer state can be kept in host memory, not on NVMe")
        reader.add("strategy.offload_optimizer=cpu")
    if stage == 3 and devices["offload_param"] != "none":
        reader.add(f"strategy.offload_param={devices['offload_param']}")
        if path := (zero.get("offload_param") or {}).get("nvme_path"):
            reader.set("strategy.nvme_path", path)
    for name, setting in BUCKETS.items():
        is_number = isinstance(zero.get(name), int | float) and not isinstance(zero[name], bool)
        if is_number and (stage == 3 or not name.startswith("stage3")) and stage:
            reader.set(setting, int(zero[name]))
    for name, reason in UNSUPPORTED.items():
        if content.get(name) or zero.get(name):
            reader.refuse(key, f"{name} of the JSON: {reason}")


def accelerate(reader: Reader, key: str, path: Path) -> None:
    """Translate accelerate's YAML file at `path`, which `key` stands for in messages."""
    content = read_mapping(path, [Path()])
    if content is None:
        raise UserError(f"{path} is not there → name accelerate's YAML file")
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        config = content.get("fsdp_config") or {}
        fsdp(reader, config, str(config.get("fsdp_sharding_strategy", "")))
    elif kind == "DEEPSPEED":
        config = content.get("deepspeed_config") or {}
        named = config.get("deepspeed_config_file")
        reader.settings[key] = named or {
            "zero_optimization": {
                "stage": config.get("zero_stage", 0),
                "offload_optimizer": {"device": config.get("offload_optimizer_device", "none")},
                "offload_param": {"device": config.get("offload_param_device", "none")},
            }
        }
        deepspeed(reader, key, [path.parent, Path()])
    elif kind in ("MULTI_GPU", "NO"):
        reader.add("strategy=ddp" if kind == "MULTI_GPU" else "strategy=single")
    else:
        reader.refuse(key, f"distributed_type {kind} is not built: FSDP, DEEPSPEED or MULTI_GPU")


def fsdp(reader: Reader, config: Mapping[str, Any], words: str) -> None:
    """Translate FSDP's settings: accelerate's names, with or without their prefix, and the words of
    HF Trainer's `fsdp`."""
    get = {str(key).removeprefix("fsdp_"): value for key, value in config.items()}.get
    words = words.lower()
    name = "hsdp" if "hybrid" in words else "ddp" if "no_shard" in words else "fsdp"
    reader.add(f"strategy={name}")
    if name == "ddp":
        return
    reshard = get("reshard_after_forward", True)
    if str(reshard).lower() in ("false", "shard_grad_op") or "shard_grad_op" in words:
        reader.add("strategy.reshard_after_forward=false")
    if get("offload_params", False) is True or "offload" in words.split():
        reader.add("strategy.offload=true")


def _device(zero: Mapping[str, Any], part: str) -> str:
    return str((zero.get(part) or {}).get("device", "none")).lower()


def read_mapping(named: Any, folders: list[Path]) -> dict[str, Any] | None:
    """The mapping in the JSON or YAML file that is `named`, in the first of `folders` that has it;
    None if there is none."""
    for folder in folders:
        path = folder / str(named)
        if path.is_file():
            text = regular.read_text(path)
            try:
                content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            except (ValueError, yaml.YAMLError) as error:
                raise UserError(f"{path} cannot be read: {error} → mend the file") from error
            if not isinstance(content, dict):
                raise UserError(f"{path} has no keys → name a file with settings")
            return content
    return None
