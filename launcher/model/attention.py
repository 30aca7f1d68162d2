"""Causal attention that builds no mask, for architectures known to need none.

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


# Seen to give the logits of transformers' own "sdpa". Others (attention sinks, biases, masks of
# their own) keep what transformers chooses.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def attention_for(choice: str, architecture: PreTrainedConfig) -> str:
    """`choice`, or the maskless form of "sdpa" where every layer attends to all earlier tokens.

    Sliding windows and the like are masks: such models keep transformers' own.
    """
    text = architecture.get_text_config()
    layers = getattr(text, "layer_types", None)
    full = (
        set(layers) == {"full_attention"} if layers else not getattr(text, "sliding_window", None)
    )
    known = text.model_type in KNOWN
    return CAUSAL if choice == "sdpa" and full and known else choice
