"""Small random models of any architecture, a batch for them, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from launcher.data.collate import IGNORED, MicroBatch
from launcher.training.loss import token_loss

VOCABULARY, WIDTH = 211, 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    names = AutoConfig.for_model(kind)
    sizes = {key: value for key, value in SIZES.items() if hasattr(names, key)}
    config = AutoConfig.for_model(kind, **{**sizes, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def batch_of(rows: int = 2, length: int = 24, targets: int = 29) -> MicroBatch:
    """A random batch; half of the target positions are padding, as in the loader."""
    draw = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
    at = torch.randperm(rows * length, generator=draw)[:targets].sort().values
    ids = torch.randint(3, VOCABULARY, (targets,), generator=draw)
    places, padded = torch.zeros(64, dtype=torch.int64), torch.full((64,), IGNORED)
    places[:targets], padded[:targets] = at, ids
    return MicroBatch(input_ids, places, padded)


def gradients(model: nn.Module, *batches: MicroBatch, smoothing: float = 0.0) -> dict[str, Any]:
    """The loss of each batch of a step, and the summed gradient of every parameter."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = token_loss(model, batch, smoothing)
        (loss * 3 / 7).backward()
        losses.append(loss.detach())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(losses), **found}
