"""A base model that is quantized in its files, or that bitsandbytes quantized when training
started."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.quantized import released
from launcher.export.quantized.blockwise import EightBitWeight, FourBitWeight, NestedScales
from launcher.export.quantized.round_trip import RoundTrip4Bit, RoundTrip8Bit
from launcher.folders.quantization import quantization_of, without_quantization
from launcher.io.readers.wrapper_prefixes import QUANTIZATION_STATE
from launcher.io.stated_dtype import stated_dtype
from launcher.io.tensor import Tensor
from launcher.io.tensor.views import transpose

WIDE = (torch.bfloat16, torch.float16, torch.float32)
REASONS = {  # of formats that stay refused
    "gptq": ": its integers are packed and ordered for the kernels of its library",
    "awq": ": its integers are packed in the order of its kernels, over scaled inputs",
}
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_ROW_MAJOR = 0  # the only weight_format that bitsandbytes still writes

# Models whose linear weights are Conv1D [in, out]; transformers transposes and then quantizes them.
_TRANSPOSED = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")

# Decoders whose linear weights are exactly those that match _LINEAR.
_PLAIN_DECODERS = (
    "gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
_LINEAR = re.compile(
    r"(model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))\.weight"
)


def dequantize_tensors(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    quantization: dict[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a folder, dequantized.

    Each quantized weight becomes one tensor of its original shape, in the dtype that its
    quantization state (4-bit) or the config names. Other tensors are unchanged.
    `quantization_config` is removed from the config.

    Args:
        quantization: How the weights are quantized, if config.json does not say it.

    Raises UserError for a format that is not known here, and for entries that belong to no weight.
    """
    scheme = quantization or quantization_of(config)
    method = None if scheme is None else _method(scheme)
    new_config = without_quantization(config)
    if method in (None, "bitsandbytes"):
        if released.has_unscaled(tensors) and not _is_plain_float8(config):
            dtype = _released_dtype(tensors, config)
            return released.dequantize(tensors, released.Scheme("fp8"), dtype), new_config
        return _dequantize_bitsandbytes(tensors, config), new_config
    if not released.look_quantized(tensors):
        return dict(tensors), new_config
    if method not in released.METHODS:
        raise UserError(
            f"quantization_config: quant_method {method} cannot be dequantized or merged into"
            f"{REASONS.get(method, '')} → use the folder of the model that it was quantized from, "
            "or --dtype base to copy the quantized weights as they are"
        )
    assert scheme is not None
    dtype = _released_dtype(tensors, config)
    return released.dequantize(tensors, released.read_scheme(scheme), dtype), new_config


def _is_plain_float8(config: dict[str, Any]) -> bool:
    """Whether config.json states that the values are FP8 without scales."""
    return str(stated_dtype(config)).startswith("torch.float8")


def _released_dtype(tensors: dict[str, Tensor], config: dict[str, Any]) -> torch.dtype:
    """The dtype of the model that was quantized: the config's, otherwise that of most tensors that
    are not quantized, as transformers takes it (gpt-oss states none)."""
    if (stated := stated_dtype(config)) in WIDE:
        return stated
    wide = [t.dtype for n, t in tensors.items() if t.dtype in WIDE and not released.is_part(n)]
    return max(WIDE, key=wide.count) if wide else torch.bfloat16


def _dequantize_bitsandbytes(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    remaining = dict(tensors)
    weights: dict[str, Tensor] = {}
    for name in tensors:
        if match := _STATE.fullmatch(name):
            weights[match[1]] = _take_four_bit(match[1], remaining.pop(name), remaining)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            weights[weight] = _take_eight_bit(weight, remaining.pop(name), remaining, config)
    for name, tensor in remaining.items():
        if re.fullmatch(QUANTIZATION_STATE, name) or (
            weights and tensor.dtype in (torch.int8, torch.uint8)
        ):
            raise UserError(
                f"{name} is part of a quantized weight of which other parts are missing; "
                f"is a shard missing?"
            )
    if config.get("model_type") in _TRANSPOSED:
        weights = {name: transpose(tensor, 0, 1) for name, tensor in weights.items()}
    result = remaining | weights
    return {name: result[name] for name in tensors if name in result}


def quantize_round_trip(
    tensors: dict[str, Tensor], config: dict[str, Any], scheme: dict[str, Any]
) -> dict[str, Tensor]:
    """The weights that QLoRA training used: the linear weights quantized as transformers does with
    the scheme, and dequantized again.

    Args:
        tensors: By their names in memory, in the dtype that training loaded them in.
        config: The model's config.json.
        scheme: A BitsAndBytesConfig as a dict. Shardway's own runs add the key `dtype`: the dtype
            that weights are dequantized to, instead of their own.

    Raises UserError for a scheme of another library and for a model that transformers does not
    have.
    """
    method = _method(scheme)
    four_bit, eight_bit = scheme.get("load_in_4bit"), scheme.get("load_in_8bit")
    kind = scheme.get("bnb_4bit_quant_type", "fp4")
    nested = bool(scheme.get("bnb_4bit_use_double_quant"))
    if method != "bitsandbytes" or not (four_bit or eight_bit) or kind not in ("nf4", "fp4"):
        raise UserError(
            f"training quantized with {method} {kind if four_bit else ''}, whose effect cannot be "
            f"reproduced here; merge into the unquantized weights instead"
        )
    linear = set(_linear_weights(tensors, config, scheme))
    if missing := sorted(linear - tensors.keys()):
        raise UserError(f"{missing[0]} is quantized in training and is not in the base model")
    result = dict(tensors)
    for name in linear:
        weight = tensors[name]
        if config.get("model_type") in _TRANSPOSED:
            weight = transpose(weight, 0, 1)
        round_trip = (
            RoundTrip4Bit(name, weight.dtype, weight.shape, weight, kind, nested)
            if four_bit
            else RoundTrip8Bit(name, weight.dtype, weight.shape, weight)
        ).to(getattr(torch, scheme["dtype"]) if "dtype" in scheme else weight.dtype)
        is_transposed = weight is not tensors[name]
        result[name] = transpose(round_trip, 0, 1) if is_transposed else round_trip
    return result


def _method(quantization: dict[str, Any]) -> str:
    if "quant_method" in quantization:
        return str(quantization["quant_method"])
    loads = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return "bitsandbytes" if loads else "(unnamed)"


def _take_four_bit(name: str, packed_state: Tensor, remaining: dict[str, Tensor]) -> FourBitWeight:
    """The weight `name`. Its parts are removed from `remaining`."""
    state = json.loads(bytes(packed_state.read_all().tolist()))
    weight = released.take_part(remaining, name, name)
    absmax = released.take_part(remaining, f"{name}.absmax", name)
    values = released.take_part(remaining, f"{name}.quant_map", name).read_all()
    nested = None
    if f"{name}.nested_absmax" in remaining:
        outer_absmax = released.take_part(remaining, f"{name}.nested_absmax", name)
        codes = released.take_part(remaining, f"{name}.nested_quant_map", name).read_all()
        nested = NestedScales(
            outer_absmax, codes, state["nested_blocksize"], state["nested_offset"]
        )
    shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
    count, block = shape[0] * shape[1], state["blocksize"]
    fits = weight.nbytes >= (count + 1) // 2 and absmax.rows == -(-count // block)
    if not fits or weight.columns != 1 or absmax.dtype != (torch.uint8 if nested else torch.float):
        raise UserError(
            f"{name}: {list(weight.shape)} and its absmax {list(absmax.shape)} do not make up a "
            f"weight of {list(shape)}; save it again with this version of bitsandbytes"
        )
    return FourBitWeight(name, dtype, shape, weight, absmax, values, block, nested)


def _take_eight_bit(
    name: str, absmax: Tensor, remaining: dict[str, Tensor], config: dict[str, Any]
) -> EightBitWeight:
    """The weight `name`. Its parts are removed from `remaining`."""
    weight = released.take_part(remaining, name, name)
    layout = remaining.pop(name.removesuffix("weight") + "weight_format", None)
    if layout is not None and int(layout.read_all()) != _ROW_MAJOR:
        raise UserError(
            f"{layout.name} is {int(layout.read_all())}, a layout that bitsandbytes no longer "
            f"reads; use the folder of the model that it was quantized from"
        )
    if weight.dtype != torch.int8 or absmax.rows != weight.rows:
        raise UserError(
            f"{name} {list(weight.shape)} of {weight.dtype} and {absmax.name} "
            f"{list(absmax.shape)} do not make up an 8-bit weight; is a shard missing?"
        )
    return EightBitWeight(name, _config_dtype(config), weight.shape, weight, absmax)


def _config_dtype(config: dict[str, Any]) -> torch.dtype:
    if (stated := stated_dtype(config)) in WIDE:
        return stated
    raise UserError(
        "config.json names no dtype, and 8-bit weights do not store it; add dtype: bfloat16, "
        "float16 or float32, the dtype that the model was trained in"
    )


def _linear_weights(
    tensors: dict[str, Tensor], config: dict[str, Any], scheme: dict[str, Any]
) -> Iterator[str]:
    """The weights that transformers' `replace_with_bnb_linear` quantizes."""
    skipped = scheme.get("llm_int8_skip_modules")
    matrices = [name for name, tensor in tensors.items() if len(tensor.shape) == 2]
    embeddings = ("model.embed_tokens.weight", "lm_head.weight")
    plain = all(_LINEAR.fullmatch(name) or name in embeddings for name in matrices)
    if skipped is None and plain and config.get("model_type") in _PLAIN_DECODERS:
        yield from (name for name in matrices if name not in embeddings)
    else:
        yield from _linear_by_class(config, skipped)


def _linear_by_class(config: dict[str, Any], skipped: list[str] | None) -> Iterator[str]:
    """The same weights, found in the model's modules. This builds the model without data."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import (
        MODULES_TO_PATCH_FOR_QUANTIZATION,
        get_keys_to_not_convert,
    )
    from transformers.quantizers.quantizers_utils import should_convert_module

    from launcher.export.names import build_on_meta

    model = build_on_meta(config)
    unquantized = get_keys_to_not_convert(model) if skipped is None else list(skipped)
    unquantized += list(model._keep_in_fp32_modules or ())
    for path, module in model.named_modules():
        if type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION:
            raise UserError(
                f"{path}: transformers rebuilds {type(module).__name__} before it quantizes; "
                f"merge into the unquantized weights instead"
            )
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and (
            should_convert_module(path, unquantized)
        ):
            if f"{path}.weight" in model.all_tied_weights_keys:
                raise UserError(
                    f"llm_int8_skip_modules {unquantized} leaves out {path}, which is tied to the "
                    f"embedding; merge into the unquantized weights instead"
                )
            yield f"{path}.weight"
