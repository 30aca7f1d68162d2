"""Causal attention that builds no mask, for architectures known to need none.

Batches are right-padded and causal: no token of a row sees its padding, so no mask is needed.
transformers' "sdpa" still looks for packed rows in `position_ids` at every forward, which makes the
host wait for the device. An attention function without a mask function of the same name is handed
None instead (transformers.masking_utils), and then computes with `is_causal`.

Packed sequences hold several documents, none of which may see another. Their attention is computed
document by document: on a GPU in half precision by torch's varlen kernel, elsewhere one after the
other. Architectures that are not known get transformers' own mask for packed rows, of which every
micro-batch has one of [length, length].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "shardway_causal"
PACKED = "shardway_packed"

# Seen to give the logits of transformers' own "sdpa". Others (attention sinks, biases, masks of
# their own) keep what transformers chooses.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
WINDOWED = ("full_attention", "sliding_attention")


def attention_for(choice: str, architecture: PreTrainedConfig, packed: bool = False) -> str:
    """`choice`, or the maskless form of "sdpa" where every layer attends to all earlier tokens.

    Sliding windows and the like are masks: such models keep transformers' own, unless rows are
    packed.
    """
    text = architecture.get_text_config()
    if choice != "sdpa" or text.model_type not in KNOWN:
        return choice
    layers = set(getattr(text, "layer_types", None) or ())
    if packed:
        return PACKED if layers <= set(WINDOWED) else choice
    full = layers == {"full_attention"} if layers else not getattr(text, "sliding_window", None)
    return CAUSAL if full else choice


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
    """Causal attention within each document, by the contract of transformers' attention functions.

    query [rows, heads, length, d], key and value [rows, key heads, length, d]; the documents lie
    end to end over the flattened rows. Returns [rows, length, heads, d]. Without documents the rows
    are one each.
    """
    rows, heads, length, size = query.shape
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and not dropout and cu_seq_lens_q is not None:
        from torch.nn.attention.varlen import varlen_attn

        reach = -1 if sliding_window is None else sliding_window - 1
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
            window_size=(reach, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(out, torch.Tensor)
    else:
        lengths = document_lengths or (length,) * rows
        out = _each_document(flat, lengths, scaling, dropout, sliding_window)
    return out.view(rows, length, heads, size), None


def _each_document(
    flat: list[torch.Tensor],
    lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Of query, key and value [total, heads, d]: one document after the other."""
    parts = []
    for query, key, value in zip(*(each.split(lengths) for each in flat), strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
        mask = None
        if window is not None and len(query) > window:
            apart = torch.arange(len(query), device=query.device)
            distance = apart[:, None] - apart[None, :]
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
