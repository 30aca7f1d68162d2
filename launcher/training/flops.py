"""Floating-point operations of a training step by formula, and the peak FLOP/s of a device.

Only the operations of the mathematical model count, each once: no padding, and no activations that
are computed again. The ratio to the peak is therefore MFU, not HFU (PaLM,
https://arxiv.org/abs/2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.cluster.gpu_specs import spec_of_device
from launcher.errors import UserError
from launcher.model.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Flops:
    """Operations of one forward and backward pass."""

    per_token: int  # in matrix products with weights
    per_pair: int  # in attention, for each pair of a token and a token that it attends to

    def total(self, tokens: int, pairs: int) -> int:
        """The operations for that many tokens and pairs."""
        return self.per_token * tokens + self.per_pair * pairs


def count_flops(model: nn.Module) -> Flops:
    """The operations of `model`, after the method prepared it and before it is sharded.

    Let N be the parameters of linear layers (a tied head counts, embedding lookups do not), and `a`
    the operations of causal attention in forward. A token costs 6N + 3a in full training. With a
    frozen base it costs 4N + 3a, plus 2 for each trained parameter. A multiplication and an
    addition are two operations: each parameter has 2 in forward, 2 in backward for the gradient of
    the input, and 2 for the gradient of the weight. Layers below the first one with a trained
    parameter have no backward. A row of s tokens has s(s + 1)/2 pairs with 4 × heads × head size
    operations in each layer, so a = 2·L·H·s for a token of a long row
    (https://arxiv.org/abs/2001.08361, 2.1, halved because of the causal mask).

    Raises UserError for a model to which this does not apply.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    _check_architecture(model, config)
    layers = decoder_layers(model)
    in_layers = {id(module) for layer in layers for module in layer.modules()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    is_trained = [_has_trained_parameters(module) for module in (embedding, *layers)]
    first_trained = is_trained.index(True) if True in is_trained else len(is_trained)
    without_backward = max(0, first_trained - 1)  # number of layers
    per_token = sum(
        _linear_flops(layer, index >= without_backward) for index, layer in enumerate(layers)
    )
    per_token += _linear_flops(model, without_backward < len(layers), excluded=in_layers)
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    forward_per_pair = 4 * config.num_attention_heads * head_size
    return Flops(per_token, forward_per_pair * (3 * len(layers) - 2 * without_backward))


def try_count_flops(model: nn.Module, log: Callable[[str], None]) -> Flops | None:
    """`count_flops`, or None after reporting why it does not apply."""
    try:
        return count_flops(model)
    except UserError as error:
        reason = str(error)
    except AttributeError:
        reason = "whose configuration has sizes of other names"
    log(f"mfu is not reported: no formula for the operations of {type(model).__name__}, {reason}")
    return None


def may_have_peak(device: torch.device, peak_tflops: float | None) -> bool:
    """Whether MFU is expected of `device`: a GPU, or a device whose peak is configured."""
    return device.type == "cuda" or peak_tflops is not None


def peak_flops(
    device: torch.device, compute: torch.dtype, peak_tflops: float | None
) -> float | None:
    """Peak FLOP/s of one device in the dtype `compute`: `peak_tflops` if it is set, otherwise by
    the name of the device; None if unknown."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda":
        return None
    if compute == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return None  # the table has no values for TF32
    return peak_flops_by_name(torch.cuda.get_device_name(device), compute)


def peak_flops_by_name(name: str, compute: torch.dtype) -> float | None:
    """Peak FLOP/s in `compute` of the device that the driver calls `name`; None if unknown."""
    spec = spec_of_device(name)
    if spec is None:
        return None
    return (spec.single if compute == torch.float32 else spec.half) * 1e12


def _linear_flops(module: nn.Module, has_backward: bool, excluded: Collection[int] = ()) -> int:
    """Operations per token of the linear layers in `module`, without the modules whose id is in
    `excluded`."""
    total = 0
    for name, layer in module.named_modules():
        # PEFT keeps the original module beside the copy that it trains, but does not use it.
        if not isinstance(layer, nn.Linear) or id(layer) in excluded or "original_module" in name:
            continue
        # Not by the shape of the weight, which differs if it is quantized or sharded.
        is_trained = layer.weight.requires_grad
        total += layer.in_features * layer.out_features * (2 + 2 * has_backward + 2 * is_trained)
    return total


def _has_trained_parameters(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _check_architecture(model: nn.Module, config: PreTrainedConfig) -> None:
    """Raises UserError for a model to which the formula does not apply."""
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise UserError(f"whose layers do not all have full attention ({', '.join(sorted(kinds))})")
    if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None):
        raise UserError("whose layers attend to a sliding window")
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or "lora_" in module_name:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and "lora_" not in name:
                raise UserError("which has matrices outside linear layers, such as fused experts")
