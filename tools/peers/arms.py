"""The arms: each system with its defaults and with its best settings. Add new arms here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.config import store

SYSTEMS = {
    "shardway": "Shardway",
    "hf": "HF Trainer + PEFT",
    "trl": "TRL SFTTrainer",
    "llamafactory": "LLaMA-Factory",
}


@dataclass(frozen=True)
class Arm:
    name: str
    system: str
    says: str  # the description in the table
    settings: dict[str, Any] = field(default_factory=dict)
    packed: bool = False  # a row of a batch is a pack of max_length tokens
    sequential: bool = True  # every step sees the same rows as in the other arms in order
    extra: bool = False  # run only when named

    @property
    def is_ours(self) -> bool:
        return self.system == "shardway"


PLAIN_TRL = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}}
PLAIN_FACTORY = {"disable_gradient_checkpointing": True}

ARMS = (
    Arm("shardway", "shardway", "strategy=fsdp", {"strategy": "fsdp"}),
    Arm("shardway-ddp", "shardway", "strategy=ddp", {"strategy": "ddp"}),
    Arm(
        "shardway-packed",
        "shardway",
        "strategy=ddp data.packing=true",
        {"strategy": "ddp", "data.packing": True},
        packed=True,
        sequential=False,
    ),
    Arm("hf", "hf", "defaults"),
    Arm("hf-flat", "hf", "padding-free: DataCollatorWithFlattening", {"padding_free": True}),
    Arm(
        "hf-grouped",
        "hf",
        "group_by_length",
        {"train_sampling_strategy": "group_by_length"},
        sequential=False,
        extra=True,
    ),
    Arm("trl", "trl", "defaults (checkpointing, fp32 weights)"),
    Arm("trl-plain", "trl", "no checkpointing, bf16 weights", PLAIN_TRL, extra=True),
    Arm(
        "trl-packed",
        "trl",
        "packing, no checkpointing, bf16 weights",
        {**PLAIN_TRL, "packing": True},
        packed=True,
        sequential=False,
    ),
    Arm("llamafactory", "llamafactory", "defaults (checkpointing)"),
    Arm("llamafactory-plain", "llamafactory", "no checkpointing", PLAIN_FACTORY, extra=True),
    Arm(
        "llamafactory-packed",
        "llamafactory",
        "neat_packing, no checkpointing",
        {**PLAIN_FACTORY, "neat_packing": True},
        packed=True,
        sequential=False,
    ),
)


def missing(arm: Arm) -> str | None:
    """The message about a setting of `arm` that this Shardway does not have; None if it has all."""
    for key in arm.settings if arm.is_ours else ():
        section, dot, _ = key.partition(".")
        if dot and key not in store.setting_names(section):
            return store.describe_unknown(key)
    return None
