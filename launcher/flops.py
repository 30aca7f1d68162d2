"""Floating-point operations of a training step by formula, and what a device could do at most.

Only what the mathematics asks for is counted, once: no padding, and no activation that is computed
again. Their share of a device's peak is MFU, not HFU (PaLM, https://arxiv.org/abs/2204.02311, B).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from launcher.errors import UserError
from launcher.model.layers import decoder_layers

# NVIDIA's data sheets and architecture whitepapers, by the name that the driver gives a device:
# dense TFLOP/s in bf16 and fp16 with sums in fp32, and in fp32 (without TF32). Where a sheet prints
# figures with sparsity, half of them. Names that are not here (MIG parts, say) are not guessed.
PEAKS = (
    (r"B200", 2250.0, 75.0),
    (r"GH200 \w+|H200", 989.4, 66.9),
    (r"H100 80GB HBM3", 989.4, 66.9),  # SXM
    (r"H[12]00 NVL", 835.5, 60.0),
    (r"H100 PCIe", 756.0, 51.2),
    (r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", 312.0, 19.5),
    (r"A30", 165.0, 10.3),
    (r"A10", 125.0, 31.2),
    (r"A40", 149.7, 37.4),
    (r"RTX A6000", 154.8, 38.7),
    (r"L40S", 362.0, 91.6),
    (r"L40", 181.0, 90.5),
    (r"L4", 121.0, 30.3),
    (r"RTX 6000 Ada Generation", 364.2, 91.1),
    (r"GeForce RTX 5090", 209.5, 104.8),
    (r"GeForce RTX 4090", 165.2, 82.6),
    (r"GeForce RTX 3090", 71.0, 35.6),
)


@dataclass(frozen=True)
class Flops:
    """Operations of one forward and backward: `per_token` in matrix products with weights,
    `per_pair` in attention, for each pair of a token and one that it attends to."""

    per_token: int
    per_pair: int

    def of(self, tokens: int, pairs: int) -> int:
        return self.per_token * tokens + self.per_pair * pairs


def count(model: nn.Module) -> Flops:
    """The operations of `model`, as the method made it and before it is sharded.

    With N the parameters of linear layers (a tied head counts, embedding lookups do not) and `a`
    those of causal attention forward, a token costs 6N + 3a where all is trained, and 4N + 3a plus
    2 for each trained parameter where a base is frozen. A multiplication and an addition are two:
    2 for each parameter forward, 2 backward to the input, 2 for the weight's gradient. Below the
    first layer with a trained parameter nothing goes backward. A row of s tokens has s(s + 1)/2
    pairs at 4 × heads × head size in each layer: a = 2·L·H·s for a token of a long row
    (https://arxiv.org/abs/2001.08361, 2.1, halved as the mask is causal).

    Raises UserError for a model to which that does not apply.
    """
    settings = model.config.get_text_config()  # type: ignore[union-attr,operator]
    _refuse_other_shapes(model, settings)
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    learns = [_learns(model.get_input_embeddings()), *map(_learns, layers)]  # type: ignore[operator]
    lowest = learns.index(True) if True in learns else len(learns)
    below = max(0, lowest - 1)  # layers through which nothing goes backward
    per_token = sum(_linear(layer, index >= below) for index, layer in enumerate(layers))
    per_token += _linear(model, below < len(layers), inside)
    head = getattr(settings, "head_dim", None) or (
        settings.hidden_size // settings.num_attention_heads
    )
    forward = 4 * settings.num_attention_heads * head
    return Flops(per_token, forward * (3 * len(layers) - 2 * below))


def counted(model: nn.Module, say: Callable[[str], None]) -> Flops | None:
    """`count`, or None after saying why not."""
    try:
        return count(model)
    except UserError as error:
        say(f"mfu: not for {type(model).__name__}: {error}")
        return None


def peak(device: torch.device, compute: torch.dtype, stated: float | None) -> float | None:
    """FLOP/s of one device at most in the dtype `compute`: `stated` TFLOP/s, else by its name; None
    where that is not known."""
    if stated is not None:
        return stated * 1e12
    if device.type != "cuda":
        return None
    if compute == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32, of which the table knows nothing
    return peak_of(torch.cuda.get_device_name(device), compute)


def peak_of(name: str, compute: torch.dtype) -> float | None:
    """FLOP/s of the device `name`, as the driver calls it, in `compute`; None where not known."""
    for pattern, half, single in PEAKS:
        if re.fullmatch(f"(NVIDIA )?({pattern})", name):
            return (single if compute == torch.float32 else half) * 1e12
    return None


def _linear(module: nn.Module, backward: bool, but: set[int] | None = None) -> int:
    """Operations of the linear layers in `module`, those in `but` left out, per token."""
    total = 0
    for name, each in module.named_modules():
        # PEFT keeps the original beside a copy that it trains, and does not compute with it.
        if not isinstance(each, nn.Linear) or id(each) in (but or ()) or "original_module" in name:
            continue
        # By its features: a quantised or sharded weight has another shape.
        trained = each.weight.requires_grad
        total += each.in_features * each.out_features * (2 + 2 * backward + 2 * trained)
    return total


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _refuse_other_shapes(model: nn.Module, settings: object) -> None:
    kinds = set(getattr(settings, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise UserError(f"its layers attend otherwise than to all before ({', '.join(kinds)})")
    if not hasattr(settings, "layer_types") and getattr(settings, "sliding_window", None):
        raise UserError("its layers attend to a sliding window")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or "lora_" in name:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and "lora_" not in own:
                raise UserError(f"{name}.{own} is a matrix outside a linear layer")
