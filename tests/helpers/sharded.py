"""Checkpoints that DeepSpeed's own engine saves of a tiny model, and the weights it had then."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.distributed.process_group import RankInfo

SEED = 5
VOCAB = 1001  # not divisible by any number of ranks


@dataclass(frozen=True)
class Trained:
    """What is trained and saved."""

    stage: int
    round_robin: bool = False
    alignment: bool = False
    lora: bool = False
    tied: bool = False
    exclude_frozen: bool = False
    precision: str = "bf16"
    base: Path | None = None  # a model folder; otherwise a new model, defined below
    extra: str = "{}"  # JSON: sections for DeepSpeed's configuration

    def __str__(self) -> str:
        options = [n for n, value in vars(self).items() if value is True]
        extra = [*json.loads(self.extra)]
        return "-".join([f"zero{self.stage}", *options, self.precision, *extra])


def tiny_llama(tied: bool = False, seed: int = SEED) -> nn.Module:
    """Two layers in fp32, with persistent buffers and parameters of one element."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=50, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    norm = model.model.norm
    norm.register_buffer("seen", torch.tensor([2**40 + 1, 7]))
    norm.register_buffer("scale", torch.tensor(0.1))
    norm.tiny = nn.Linear(1, 1)
    norm.register_forward_hook(lambda module, _, out: out + module.tiny(out[..., :1]))
    return model


def save_zero(rank_info: RankInfo, folder: Path, kind: Trained) -> dict[str, torch.Tensor]:
    """Train two steps under ZeRO and save; return the weights by name, on every rank."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = _loaded(kind.base) if kind.base else tiny_llama(kind.tied)
    if kind.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=3, target_modules=targets))
    deepspeed.init_distributed()
    trained = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in trained if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=_config(kind, rank_info.world_size),
        dist_init_required=False,
    )  # fmt: skip
    for step in range(2):
        torch.manual_seed(step * 10 + rank_info.rank)
        tokens = torch.randint(model.config.vocab_size, (1, 12))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=kind.exclude_frozen)
    return _weights_of(engine.module, kind)


def to_universal(folder: Path) -> None:
    """Let DeepSpeed convert `folder/zero`, saved after two steps, into `folder/universal`."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder / "zero" / "global_step2"), output_folder=str(folder / "universal"),
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
        inject_missing_state=True,
    )  # fmt: skip
    ds_to_universal.main(options)


def _loaded(base: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _weights_of(model: nn.Module, kind: Trained) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv" not in name}
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=kind.stage == 3):
        for name, parameter in model.named_parameters():
            found[name] = parameter.detach().clone()
    return found


def _config(kind: Trained, world: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": kind.precision == "bf16"},
        "fp16": {"enabled": kind.precision == "fp16"},
        "zero_optimization": {
            "stage": kind.stage,
            "round_robin_gradients": kind.round_robin,
            "parameter_alignment": kind.alignment,
            "sub_group_size": 30_000,
            "stage3_param_persistence_threshold": 0,
        },
    }
    return config | json.loads(kind.extra)
