"""Causal attention without a mask, for architectures that are known to need none.

Batches are padded on the right and causal: no token of a row attends to its padding, so no mask is
needed. In every forward, transformers' "sdpa" still checks `position_ids` for packed rows, which
makes the host wait for the device. An attention function without a mask function of the same name
gets None instead (transformers.masking_utils), and then computes with `is_causal`.

Packed sequences have several documents, which must not attend to each other. Their attention is
computed for each document: on a GPU in half precision by torch's varlen kernel if it knows the size
of the heads, otherwise one after the other. Other architectures get transformers' own mask for
packed rows, [length, length] for each sequence of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from launcher.io.model_class import causal_class, named_class, text_class

EAGER = "eager"
CAUSAL = "shardway_causal"
PACKED = "shardway_packed"

# Architectures that are tested to give the logits of transformers' "sdpa". Others (attention sinks,
# biases, masks of their own) keep the attention that transformers chooses.
MASKLESS_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
PACKABLE_LAYER_TYPES = ("full_attention", "sliding_attention")


def choose_attention(choice: str, architecture: PreTrainedConfig, packed: bool = False) -> str:
    """What computes attention in a model of `architecture`, for `model.attention`.

    "sdpa" becomes its variant without a mask if the model supports that, and transformers' "eager"
    if its class has no "sdpa": attention with sinks or biases, or no attention at all. A sliding
    window needs a mask, so models with one keep transformers' own attention, unless rows are
    packed.
    """
    if choice != "sdpa":
        return choice
    if not has_sdpa(architecture):
        return EAGER
    config = architecture.get_text_config()
    if config.model_type not in MASKLESS_MODEL_TYPES:
        return choice
    layer_types = set(getattr(config, "layer_types", None) or ())
    if packed:
        return PACKED if layer_types <= set(PACKABLE_LAYER_TYPES) else choice
    if layer_types:
        is_full = layer_types == {"full_attention"}
    else:
        is_full = not getattr(config, "sliding_window", None)
    return CAUSAL if is_full else choice


def has_sdpa(architecture: PreTrainedConfig) -> bool:
    """Whether the class that is trained for `architecture` computes attention by torch's
    scaled_dot_product_attention. A class with its own Python code is not known: True."""
    known = causal_class(architecture) or text_class(architecture) or named_class(architecture)
    return known is None or bool(known._supports_sdpa)


def is_ours(model: Any) -> bool:
    """Whether attention in a built model is computed by a function of this module."""
    return model.config.get_text_config()._attn_implementation in (CAUSAL, PACKED)


def describe_attention(choice: str, model: Any) -> str:
    """What `model.attention` has become in a built model, for the log."""
    used = model.config.get_text_config()._attn_implementation
    if used == choice:
        return str(used)
    if used == EAGER:
        return f"eager, because {type(model).__name__} has no {choice}"
    what = {CAUSAL: "causal, without a mask tensor", PACKED: "causal, document by document"}
    return f"{choice}, {what[used]}" if used in what else f"{used}, not {choice}"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, with the interface of transformers' attention
    functions.

    query [rows, heads, length, d], key and value [rows, key heads, length, d]. The documents are
    contiguous in the flattened rows; without `document_lengths`, each row is one document. Returns
    [rows, length, heads, d].
    """
    rows, heads, length, size = query.shape
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    has_kernel = fits_varlen(query.dtype, size)
    if query.is_cuda and has_kernel and not dropout and cu_seq_lens_q is not None:
        from torch.nn.attention.varlen import varlen_attn

        left_window = -1 if sliding_window is None else sliding_window - 1
        assert max_length_q is not None
        out = varlen_attn(
            flat[0],
            flat[1],
            flat[2],
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(left_window, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(out, torch.Tensor)
    else:
        lengths = document_lengths or (length,) * rows
        out = _attend_by_document(flat, lengths, scaling, dropout, sliding_window)
    return out.view(rows, length, heads, size), None


def fits_varlen(dtype: torch.dtype, size: int) -> bool:
    """Whether flash attention, which the varlen kernel is, computes heads of `size` in `dtype`."""
    return dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256


def _attend_by_document(
    flat: list[torch.Tensor],
    lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """`flat` is query, key and value [total, heads, d]; returns [total, heads, d]."""
    parts = []
    for query, key, value in zip(*(tensor.split(lengths) for tensor in flat), strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        mask = None
        if window is not None and len(query) > window:
            positions = torch.arange(len(query), device=query.device)
            distance = positions[:, None] - positions[None, :]
            mask = (distance >= 0) & (distance < window)
        part = scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionInterface.register(PACKED, packed_attention)
