"""`--dtype base`: the result in the format in which its base is quantized.

Weights that nothing changed keep the bytes of the base. Merged and trained ones are quantized
again, with scales of their own.
"""

from __future__ import annotations

from launcher.errors import UserError
from launcher.export.assembled import Assembled, Config, Tensors
from launcher.export.quantized.blockwise import EightBitWeight, FourBitWeight
from launcher.export.quantized.released import ACTIVATION
from launcher.export.quantized.requantize import Layout, NewNumbers, NewScales
from launcher.export.quantized.scaled import ScaledWeight
from launcher.folders.model_config import NESTED
from launcher.folders.quantization import KEY
from launcher.io.tensor import Tensor
from launcher.io.tensor.layouts import Transposed
from launcher.io.tensor.views import reshape, transpose

INTO_BF16 = "→ --dtype bf16, or quantize that again with the tool that made the base"


def in_base_format(result: Assembled, base: Tensors, stored: Tensors, config: Config) -> Assembled:
    """`result` with the weights that are quantized in the base quantized as there.

    Args:
        base: The base's tensors, dequantized.
        stored: The same as they are in its files.
        config: The base's config.json.

    Raises UserError for a format in which nothing is written here.
    """
    quantized = {name: weight for name in base if (weight := _weight_of(base[name])) is not None}
    if not quantized:
        return result
    tensors: Tensors = {}
    actions: dict[str, str] = {}
    for name, tensor in result.tensors.items():
        action = result.actions[name]
        if name not in quantized:
            parts = {name: tensor}
        elif tensor == base[name]:
            parts = {part.name: part for part in quantized[name].parts}
            action = "copied"
        else:
            parts = _quantized_again(tensor, base[name], quantized[name])
            action = f"{action}, quantized"
        tensors |= parts
        actions |= dict.fromkeys(parts, action)
    measured = {name: t for name, t in stored.items() if ACTIVATION.fullmatch(name)}
    notes = [f"written in the format of the base: {len(quantized)} weights are quantized"]
    if measured:
        notes.append(f"{len(measured)} scales of activations are those measured on the base")
    return Assembled(
        tensors | measured,
        actions | dict.fromkeys(measured, "copied"),
        _with_quantization(result.config, config),
        (*result.notes, *notes),
    )


def _weight_of(tensor: Tensor) -> ScaledWeight | None:
    inner = tensor.source if isinstance(tensor, Transposed) else tensor
    if isinstance(inner, FourBitWeight | EightBitWeight):
        raise UserError(
            f"--dtype base: {tensor.name} is quantized by bitsandbytes, which quantizes 16-bit "
            "weights when it loads them → --dtype bf16"
        )
    return inner if isinstance(inner, ScaledWeight) else None


def _quantized_again(tensor: Tensor, like: Tensor, weight: ScaledWeight) -> Tensors:
    """The parts of `tensor`, by the names of those of `weight`."""
    if weight.zeros is not None:
        raise UserError(
            f"--dtype base: {tensor.name} has zero points (symmetric: false), which are not "
            f"computed here {INTO_BF16}"
        )
    if tensor.shape != like.shape:
        raise UserError(
            f"--dtype base: {tensor.name} is {list(tensor.shape)} and quantized as "
            f"{list(like.shape)} in the base {INTO_BF16}"
        )
    matrices = transpose(tensor, 1, 2) if isinstance(like, Transposed) else tensor
    numbers, scales, *others = weight.parts
    layout = Layout(weight)
    packed = getattr(weight.numbers, "packed", weight.numbers)
    shape, grid = (*matrices.shape[:-1], packed.columns), layout.grid.values.shape
    new = (
        reshape(NewNumbers(numbers.name, numbers.dtype, shape, matrices, layout), numbers.shape),
        reshape(NewScales(scales.name, scales.dtype, grid, matrices, layout), scales.shape),
    )
    return {part.name: part for part in (*new, *others)}


def _with_quantization(config: Config, original: Config) -> Config:
    """`config` with the `quantization_config` of the base where the base has it."""
    result = config | {KEY: original[KEY]} if KEY in original else config
    nested = original.get(NESTED)
    if isinstance(nested, dict) and KEY in nested:
        result = result | {NESTED: result[NESTED] | {KEY: nested[KEY]}}
    return result
