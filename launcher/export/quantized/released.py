"""The weights of models that are released quantized, found by the names in their files.

FP8 (DeepSeek and others, fbgemm, ModelOpt), MXFP4 (gpt-oss) and compressed-tensors (FP8, INT8, INT4
packed in int32). A weight and its parts have names with the same beginning.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.quantized.packed import WORD_BITS, UnpackedFloats, UnpackedIntegers
from launcher.export.quantized.scaled import Grid, ScaledWeight
from launcher.io.tensor import Tensor
from launcher.io.tensor.views import reshape, transpose

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NUMBERS = (*FLOAT8, torch.int8, torch.uint8, torch.int32)
SCALES = ("_scale_inv", "_scale")  # after the name of the weight
SHORT_SCALES = ("scale", "qscale_weight")  # instead of "weight": DeepSeek-V4, Mistral
# Of activations: no part of a weight.
ACTIVATION = re.compile(
    r".+[._](?:(?:input|output|activation|[qkv]|kv_cache|prob)_(?:global_)?(?:scale|zero_point)"
    r"|input_scale_ub|qscale_act)"
)
PART = re.compile(
    r".+(?:weight|proj)_(?:packed|scale|scale_inv|scale_2|zero_point|shape|g_idx|global_scale"
    r"|blocks|scales)"
)
METHODS = ("fp8", "fbgemm_fp8", "modelopt", "mxfp4", "compressed-tensors")
COMPRESSED_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
MODELOPT_ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN")
PACKED_BITS = (1, 2, 4, 8)  # of which a whole number fits into a word


@dataclass(frozen=True)
class Scheme:
    """What quantization_config says about the weights."""

    method: str
    blocks: tuple[tuple[int, int], ...] = ()  # rows and columns; the last may be smaller
    bits: tuple[int, ...] = ()  # of packed integers
    symmetric: bool = True


def read_scheme(quantization: dict[str, Any]) -> Scheme:
    """Raises UserError for a format whose weights cannot be read."""
    method = str(quantization.get("quant_method"))
    if method == "modelopt" and (algorithm := quantization.get("quant_algo")) is not None:
        _check_known("quant_algo", algorithm, MODELOPT_ALGORITHMS)
    if method == "compressed-tensors":
        return _compressed_scheme(quantization)
    block = quantization.get("weight_block_size")
    return Scheme(method, blocks=(_pair(block),) if block else ((128, 128),))


def dequantize(tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """`tensors` with each quantized weight as one tensor of `dtype`; those of activations are left
    out.

    Raises UserError for a part that belongs to no weight, and for parts that do not fit.
    """
    remaining = dict(tensors)
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in remaining:
            continue
        if name.endswith("_blocks") and scheme.method == "mxfp4":
            weight = name.removesuffix("_blocks")
            weights[weight] = _take_mxfp4(weight, remaining, dtype)
        elif name.endswith("_packed") and scheme.method == "compressed-tensors":
            weight = name.removesuffix("_packed")
            weights[weight] = _take_packed(weight, remaining, scheme, dtype)
        elif (tensor.dtype in FLOAT8 or tensor.dtype == torch.int8) and (
            scale := _scale_name(name, remaining)
        ):
            weights[name] = _take_scaled(name, scale, remaining, scheme, dtype)
    _refuse_parts(remaining)
    kept = {name: t for name, t in remaining.items() if not ACTIVATION.fullmatch(name)}
    return kept | weights


def has_unscaled(tensors: dict[str, Tensor]) -> bool:
    """Whether a tensor is FP8, whose values mean nothing without its scale."""
    return any(tensor.dtype in FLOAT8 for tensor in tensors.values())


def look_quantized(tensors: dict[str, Tensor]) -> bool:
    """Whether a matrix consists of small or packed numbers."""
    return any(tensor.dtype in NUMBERS and len(tensor.shape) > 1 for tensor in tensors.values())


def is_part(name: str) -> bool:
    """Whether the name is that of a scale or another part, not of a weight or bias."""
    return bool(PART.fullmatch(name) or ACTIVATION.fullmatch(name)) or name.endswith(".scale")


def _refuse_parts(remaining: dict[str, Tensor]) -> None:
    for name, tensor in remaining.items():
        if ACTIVATION.fullmatch(name):
            continue
        if tensor.dtype in FLOAT8 or (tensor.dtype == torch.int8 and name.endswith("weight")):
            raise UserError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and the files have no "
                f"{name}_scale or {name}_scale_inv: its values are not known → use all files of "
                "the model, or the folder of the model that it was quantized from"
            )
        if PART.fullmatch(name):
            raise UserError(
                f"{name} is part of a quantized weight of which other parts are missing; "
                "is a shard missing?"
            )


def _scale_name(name: str, tensors: dict[str, Tensor]) -> str | None:
    names = [name + ending for ending in SCALES]
    if name.endswith(".weight"):
        names += [name.removesuffix("weight") + other for other in SHORT_SCALES]
    return next((each for each in names if each in tensors), None)


def _take_scaled(
    name: str, scale_name: str, remaining: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype
) -> ScaledWeight:
    numbers, scales = remaining.pop(name), remaining.pop(scale_name)
    zeros = remaining.pop(f"{name}_zero_point", None)
    parts = tuple(filter(None, (numbers, scales, zeros)))
    if numbers.dtype == torch.int8 and scheme.method != "compressed-tensors":  # two FP4 in a byte
        shape = (*numbers.shape[:-1], 2 * numbers.columns)
        numbers = UnpackedFloats(name, torch.float32, shape, numbers)
    return _scaled(name, numbers, scales, zeros, scheme, dtype, parts)


def _take_packed(
    name: str, remaining: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype
) -> ScaledWeight:
    """`name`: ends in "weight". Its parts are removed from `remaining`."""
    packed, scales, stated = (
        take_part(remaining, f"{name}_{part}", name) for part in ("packed", "scale", "shape")
    )
    zeros = remaining.pop(f"{name}_zero_point", None)
    order = remaining.pop(f"{name}_g_idx", None)
    shape = tuple(int(size) for size in stated.read_all().view(-1))
    bits = next((b for b in scheme.bits if _words(shape[-1], b) == packed.columns), None)
    if bits is None or packed.dtype != torch.int32 or packed.rows != math.prod(shape[:-1]):
        raise UserError(
            f"{packed.name} {list(packed.shape)} of {packed.dtype} does not contain the "
            f"{list(shape)} numbers of {list(scheme.bits)} bits that {stated.name} and config.json "
            "state; use the config.json that belongs to the files"
        )
    if order is not None:
        _check_order(order, shape[-1], scales)
    parts = tuple(filter(None, (packed, scales, zeros, stated, order)))
    numbers = UnpackedIntegers(name, torch.int8, shape, packed, bits)
    if zeros is not None:
        zeros = UnpackedIntegers(zeros.name, torch.int8, scales.shape, zeros, bits, down=True)
    return _scaled(name, numbers, scales, zeros, scheme, dtype, parts)


def _take_mxfp4(name: str, remaining: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Experts [experts, in, out], which are stored as [experts, out, groups of the inputs, bytes]
    and exponents [experts, out, groups of the inputs]."""
    blocks, scales = (take_part(remaining, f"{name}_{part}", name) for part in ("blocks", "scales"))
    experts, rows, groups, width = (*blocks.shape, 0, 0, 0)[:4]
    if len(blocks.shape) != 4 or scales.shape != (experts, rows, groups):
        raise UserError(
            f"{name}: {list(blocks.shape)} of {blocks.name} and {list(scales.shape)} of "
            f"{scales.name} do not make up a weight in MXFP4; is a shard missing?"
        )
    packed = reshape(blocks, (experts, rows, groups * width))
    shape = (experts, rows, groups * width * 2)
    numbers = UnpackedFloats(name, torch.float32, shape, packed)
    grid = Grid(scales, rows, (1, 2 * width))
    weight = ScaledWeight(name, dtype, shape, numbers, grid, None, torch.float32, (blocks, scales))
    return transpose(weight, 1, 2)


def _scaled(
    name: str,
    numbers: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
    parts: tuple[Tensor, ...],
) -> ScaledWeight:
    grid = _grid(name, numbers.shape, scales, scheme)
    zero_grid = _grid(name, numbers.shape, zeros, scheme) if zeros is not None else None
    wide = scales.dtype if scales.dtype.itemsize > 1 else torch.float32
    product = wide if scheme.method == "compressed-tensors" else torch.float32
    return ScaledWeight(name, dtype, numbers.shape, numbers, grid, zero_grid, product, parts)


def _grid(name: str, shape: tuple[int, ...], values: Tensor, scheme: Scheme) -> Grid:
    """How `values` are spread over matrices of `shape`. Raises UserError if they are not."""
    *matrices, rows, columns = (1, *shape)[-max(2, len(shape)) :]
    down, across = _grid_shape(name, tuple(matrices), rows, values)
    for height, width in scheme.blocks:
        if (-(-rows // height), -(-columns // width)) == (down, across):
            return Grid(reshape(values, (*matrices, down, across)), rows, (height, width))
    if rows % down or columns % across:
        raise UserError(
            f"{name} {list(shape)} is not divided into blocks by {values.name} "
            f"{list(values.shape)}; config.json states blocks of {[*scheme.blocks]} → use the "
            "config.json that belongs to the files"
        )
    grid = reshape(values, (*matrices, down, across))
    return Grid(grid, rows, (rows // down, columns // across))


def _grid_shape(name: str, matrices: tuple[int, ...], rows: int, values: Tensor) -> tuple[int, int]:
    """The rows and columns of the grid of each matrix."""
    count, total, shape = math.prod(matrices), math.prod(values.shape), tuple(values.shape)
    if total == count:
        return 1, 1  # one for each matrix
    if len(shape) > len(matrices) + 2:  # [rows, 1, columns, 1] of ModelOpt
        shape = tuple(size for size in shape if size != 1)
    if len(shape) >= 2 and shape[:-2] == matrices and total:
        return shape[-2], shape[-1]
    if total == count * rows:
        return rows, 1  # one for each row
    raise UserError(
        f"{name}: {values.name} {list(values.shape)} does not scale {count} matrices of {rows} "
        "rows; do they belong to different models?"
    )


def _check_order(order: Tensor, columns: int, scales: Tensor) -> None:
    """Raises UserError unless the groups are columns side by side."""
    size = columns // scales.columns
    if not torch.equal(order.read_all().view(-1).long(), torch.arange(columns) // size):
        raise UserError(
            f"{order.name} puts columns of all places into one group (actorder: group), which is "
            "not read here → use the folder of the model that it was quantized from"
        )


def _words(columns: int, bits: int) -> int:
    return -(-columns * bits // WORD_BITS)


def take_part(remaining: dict[str, Tensor], name: str, weight: str) -> Tensor:
    """The part `name` of a quantized weight, removed from `remaining`. Raises UserError if it is
    missing."""
    if name not in remaining:
        raise UserError(f"{weight} is quantized but {name} is missing; is a shard missing?")
    return remaining.pop(name)


def _compressed_scheme(quantization: dict[str, Any]) -> Scheme:
    groups = [g for g in (quantization.get("config_groups") or {}).values() if isinstance(g, dict)]
    general = quantization.get("format")
    for form in {general, *(group.get("format") for group in groups)} - {None, "mixed-precision"}:
        _check_known("format", form, COMPRESSED_FORMATS)
    sparsity = (quantization.get("sparsity_config") or {}).get("format")
    _check_known("sparsity_config: format", sparsity or "dense", ("dense",))
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    blocks = [_pair(each["block_structure"]) for each in weights if each.get("block_structure")]
    bits = {each.get("num_bits") for each in weights} & {*PACKED_BITS}
    symmetric = all(each.get("symmetric", True) for each in weights)
    return Scheme("compressed-tensors", tuple(blocks), tuple(sorted(bits)), symmetric)


def _pair(value: Any) -> tuple[int, int]:
    """A block size, as [128, 128] or "128x128"."""
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2 and all(str(size).isdecimal() for size in sizes):
        height, width = (int(size) for size in sizes)
        if height and width:
            return height, width
    raise UserError(
        f"quantization_config: the block size {value!r} is not two numbers; use the config.json "
        "that belongs to the files"
    )


def _check_known(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"quantization_config: {key} {value} cannot be dequantized here (known: "
            f"{', '.join(known)}) → use the folder of the model that it was quantized from, or "
            "--dtype base to copy the quantized weights as they are"
        )
