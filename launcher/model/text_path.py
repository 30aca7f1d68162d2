"""The parts of a composite that text does not reach: vision towers, audio encoders, projectors."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def beyond_text(model: Any) -> dict[str, nn.Module]:
    """Path → module, for the outermost modules of a transformers model that are neither in its
    decoder nor its head. Empty for a model of text alone."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or config.get_text_config(decoder=True) is config:
        return {}
    decoder = model.get_decoder()
    ends = (decoder, model.get_input_embeddings(), model.get_output_embeddings())
    if decoder is model or decoder is None:
        return {}
    reached = {id(module) for end in ends if end is not None for module in end.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{path}.") for path in found)
        is_module = not isinstance(module, nn.ModuleList | nn.ModuleDict)  # not only a container
        if is_module and not is_inside and not any(id(m) in reached for m in module.modules()):
            found[name] = module
    return found
