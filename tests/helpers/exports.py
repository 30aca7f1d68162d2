"""Adapters made by PEFT, exports made by Shardway, and what other libraries read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from launcher.commands import consolidate as verb
from launcher.export.assembled import Options
from launcher.export.plan import Plan, make_plan
from launcher.export.source import find_source


def make_adapter(
    base: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.05,
    **options: Any,
) -> Path:
    """A PEFT adapter in which both factors are random, of size `noise`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * noise
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(folder)
    return folder


def consolidate(*words: object) -> None:
    verb.consolidate(verb.parser().parse_args([str(word) for word in words]))


def plan_of(source: Path, size: int = 10**9, **where: Any) -> Plan:
    return make_plan(find_source(source, **where), Options(max_shard_bytes=size))


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: p.detach() for name, p in merged.named_parameters()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
