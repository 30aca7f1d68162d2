"""Causal attention that builds no mask.

Batches are right-padded and causal: no token of a row sees its padding, so no mask is needed.
transformers' "sdpa" still looks for packed rows in `position_ids` at every forward, which makes the
host wait for the device. An attention function without a mask function of the same name is handed
None instead (transformers.masking_utils), and then computes with `is_causal`.
"""

from __future__ import annotations

from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "shardway_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attention_for(choice: str, architecture: PreTrainedConfig) -> str:
    """`choice`, or the maskless form of "sdpa" where every layer attends to all earlier tokens.

    Sliding windows and the like are masks: such models keep transformers' own.
    """
    text = architecture.get_text_config()
    layers = getattr(text, "layer_types", None)
    full = (
        set(layers) == {"full_attention"} if layers else not getattr(text, "sliding_window", None)
    )
    causal = getattr(text, "is_causal", True)
    return CAUSAL if choice == "sdpa" and full and causal else choice
