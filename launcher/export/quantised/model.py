"""A base model that bitsandbytes has quantised, or that it quantised as training began."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast

import torch

from launcher.errors import UserError
from launcher.export.quantised.blockwise import EightBit, FourBit, Nested
from launcher.export.quantised.through import Through4Bit, Through8Bit
from launcher.export.tensor import Tensor
from launcher.export.tensor.views import transposed

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_HELPER = re.compile(
    r".+\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format)"
)
_ROW_MAJOR = 0  # the one weight_format that bitsandbytes still writes

# models whose linear weights are Conv1D [in, out], which transformers quantises transposed
_TRANSPOSED = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")

# decoders of which these names, and no others, are the linear weights
_PLAIN = ("gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
_LINEAR = re.compile(
    r"(model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))\.weight"
)


def dequantised(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a folder, and its config → the same with each quantised weight as one tensor of
    its first shape, in the dtype that its quantisation state names (4-bit) or the config (8-bit),
    and a config without `quantization_config`. What is not quantised is untouched. Raises UserError
    for other quantisations than bitsandbytes', and for entries that belong to no weight."""
    method = _method(config)
    if method not in (None, "bitsandbytes"):
        raise UserError(
            f"quantization_config: quant_method {method} cannot be merged into; "
            f"give the folder of the model that it was quantised from"
        )
    left = dict(tensors)
    found: dict[str, Tensor] = {}
    for name in tensors:
        if match := _STATE.fullmatch(name):
            found[match[1]] = _four_bit(match[1], left.pop(name), left)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = _eight_bit(weight, left.pop(name), left, config)
    for name, tensor in left.items():
        if _HELPER.fullmatch(name) or (found and tensor.dtype in (torch.int8, torch.uint8)):
            raise UserError(
                f"{name} is part of a quantised weight of which other parts are missing; "
                f"is a shard missing?"
            )
    if config.get("model_type") in _TRANSPOSED:
        found = {name: transposed(tensor, 0, 1) for name, tensor in found.items()}
    whole = left | found
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {name: whole[name] for name in tensors if name in whole}, kept


def round_trip(
    tensors: dict[str, Tensor], config: dict[str, Any], scheme: dict[str, Any]
) -> dict[str, Tensor]:
    """What QLoRA training saw: the linear weights quantised as transformers does with the scheme,
    a BitsAndBytesConfig as a dict, and dequantised to the dtype they have here, or to the scheme's
    `dtype`, which our own runs say.

    `tensors` have their names in memory, and the dtype that training loaded them in. Raises
    UserError for a scheme of another library and for a model that transformers does not have.
    """
    method = _method({"quantization_config": scheme})
    four, eight = scheme.get("load_in_4bit"), scheme.get("load_in_8bit")
    kind = scheme.get("bnb_4bit_quant_type", "fp4")
    nested = bool(scheme.get("bnb_4bit_use_double_quant"))
    if method != "bitsandbytes" or not (four or eight) or kind not in ("nf4", "fp4"):
        raise UserError(
            f"training quantised with {method} {kind if four else ''}, of which no effect is known "
            f"here; merge into the unquantised weights instead"
        )
    linear = set(_linear_weights(tensors, config, scheme))
    if absent := sorted(linear - tensors.keys()):
        raise UserError(f"{absent[0]} is quantised in training and is not in the base model")
    found = dict(tensors)
    for name in linear:
        of = tensors[name]
        if config.get("model_type") in _TRANSPOSED:
            of = transposed(of, 0, 1)
        seen = (
            Through4Bit(name, of.dtype, of.shape, of, kind, nested)
            if four
            else Through8Bit(name, of.dtype, of.shape, of)
        ).to(getattr(torch, scheme["dtype"]) if "dtype" in scheme else of.dtype)
        found[name] = transposed(seen, 0, 1) if of is not tensors[name] else seen
    return found


def _method(config: dict[str, Any]) -> str | None:
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    if "quant_method" in quantisation:
        return str(quantisation["quant_method"])
    loads = quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")
    return "bitsandbytes" if loads else "of no name"


def _four_bit(name: str, packed_state: Tensor, left: dict[str, Tensor]) -> FourBit:
    """The weight called `name`; its parts are taken out of `left`."""
    state = json.loads(bytes(packed_state.whole().tolist()))
    weight = _take(left, name, name)
    absmax = _take(left, f"{name}.absmax", name)
    values = _take(left, f"{name}.quant_map", name).whole()
    nested = None
    if f"{name}.nested_absmax" in left:
        above = _take(left, f"{name}.nested_absmax", name)
        codes = _take(left, f"{name}.nested_quant_map", name).whole()
        nested = Nested(above, codes, state["nested_blocksize"], state["nested_offset"])
    shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
    count, block = shape[0] * shape[1], state["blocksize"]
    fits = weight.nbytes >= (count + 1) // 2 and absmax.rows == -(-count // block)
    if not fits or weight.columns != 1 or absmax.dtype != (torch.uint8 if nested else torch.float):
        raise UserError(
            f"{name}: {list(weight.shape)} and its absmax {list(absmax.shape)} do not make up a "
            f"weight of {list(shape)}; save it again with this version of bitsandbytes"
        )
    return FourBit(name, dtype, shape, weight, absmax, values, block, nested)


def _eight_bit(
    name: str, absmax: Tensor, left: dict[str, Tensor], config: dict[str, Any]
) -> EightBit:
    weight = _take(left, name, name)
    layout = left.pop(name.removesuffix("weight") + "weight_format", None)
    if layout is not None and int(layout.whole()) != _ROW_MAJOR:
        raise UserError(
            f"{layout.name} is {int(layout.whole())}, a layout that bitsandbytes no longer reads; "
            f"give the folder of the model that it was quantised from"
        )
    if weight.dtype != torch.int8 or absmax.rows != weight.rows:
        raise UserError(
            f"{name} {list(weight.shape)} of {weight.dtype} and {absmax.name} "
            f"{list(absmax.shape)} are no 8-bit weight; is a shard missing?"
        )
    return EightBit(name, _dtype(config), weight.shape, weight, absmax)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    for level in (config, config.get("text_config", {})):
        name = level.get("dtype") or level.get("torch_dtype")
        if name in ("bfloat16", "float16", "float32"):
            return cast("torch.dtype", getattr(torch, name))
    raise UserError(
        "config.json names no dtype, and 8-bit weights do not say theirs; "
        "add dtype: bfloat16, float16 or float32, the one that the model was trained in"
    )


def _take(left: dict[str, Tensor], name: str, weight: str) -> Tensor:
    if name not in left:
        raise UserError(f"{weight} is quantised but {name} is missing; is a shard missing?")
    return left.pop(name)


def _linear_weights(
    tensors: dict[str, Tensor], config: dict[str, Any], scheme: dict[str, Any]
) -> Iterator[str]:
    """The weights that transformers' `replace_with_bnb_linear` quantises."""
    skipped = scheme.get("llm_int8_skip_modules")
    matrices = [name for name, tensor in tensors.items() if len(tensor.shape) == 2]
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    plain = all(_LINEAR.fullmatch(name) or name in ends for name in matrices)
    if skipped is None and plain and config.get("model_type") in _PLAIN:
        yield from (name for name in matrices if name not in ends)
    else:
        yield from _linear_by_class(config, skipped)


def _linear_by_class(config: dict[str, Any], skipped: list[str] | None) -> Iterator[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import (
        MODULES_TO_PATCH_FOR_QUANTIZATION,
        get_keys_to_not_convert,
    )
    from transformers.quantizers.quantizers_utils import should_convert_module

    from launcher.export.names import build_on_meta

    model = build_on_meta(config)
    kept = get_keys_to_not_convert(model) if skipped is None else list(skipped)
    kept += list(model._keep_in_fp32_modules or ())
    for path, module in model.named_modules():
        if type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION:
            raise UserError(
                f"{path}: transformers rebuilds {type(module).__name__} before it quantises; "
                f"merge into the unquantised weights instead"
            )
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and (
            should_convert_module(path, kept)
        ):
            if f"{path}.weight" in model.all_tied_weights_keys:
                raise UserError(
                    f"llm_int8_skip_modules {kept} leaves out {path}, which is tied to the "
                    f"embedding; merge into the unquantised weights instead"
                )
            yield f"{path}.weight"
