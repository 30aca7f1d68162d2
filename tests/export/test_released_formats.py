"""Weights that are released quantized are dequantized to the bits of the libraries that load them.

transformers dequantizes FP8 and MXFP4 here. For compressed-tensors, which is not installed, the
arithmetic of its `dequantize` and `pack_to_int32` is written out: one number after the other.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from launcher.errors import UserError
from launcher.export.quantized import dequantize_tensors
from launcher.io.tensor import Tensor, in_memory

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Parts = dict[str, torch.Tensor]


def lazy(parts: Parts) -> dict[str, Tensor]:
    return {name: in_memory(name, values, Path("base")) for name, values in parts.items()}


def dequantized(parts: Parts, dtype: str = "bfloat16", **scheme: Any) -> dict[str, Tensor]:
    config = {"dtype": dtype, "quantization_config": scheme, "model_type": "llama"}
    tensors, result = dequantize_tensors(lazy(parts), config)
    assert result == {"dtype": dtype, "model_type": "llama"}
    return tensors


def assert_bits(tensor: Tensor, expected: torch.Tensor) -> None:
    """All at once, in tiles that start and end inside a block, and by the slow implementation."""
    assert (tensor.dtype, tensor.shape) == (expected.dtype, tuple(expected.shape))
    assert torch.equal(tensor.read_all(), expected)
    flat = expected.reshape(tensor.rows, tensor.columns)
    cuts = sorted({0, tensor.rows // 3, tensor.rows // 2 + 1, tensor.rows})
    for first, last in itertools.pairwise(cuts):
        assert torch.equal(tensor.read(first, last), flat[first:last])
        exact = tensor.reference(first, last)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact, flat[first:last].double(), rtol=2**-8, atol=1e-30)


def random(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8(*shape: int) -> torch.Tensor:
    return (random(*shape) * 60).to(FP8)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (random(*shape, seed=5).abs() * 1e-3 + 1e-4).to(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((256, 384), (2, 3), [128, 128]),
        ((3, 96, 64), (3, 3, 2), [32, 32]),
        ((64, 48), (), None),
        ((64, 48), (1,), None),
        ((64, 48), (64, 1), None),
        ((48, 48), (1, 48), None),
    ],
)
def test_fp8_is_dequantized_as_transformers_does(
    shape: tuple[int, ...], grid: tuple[int, ...], block: Any, dtype: str
) -> None:
    weight, inverse = fp8(*shape), scales(*grid)
    expected = Fp8Dequantize(None)._dequantize_one(weight, inverse, getattr(torch, dtype))
    name = "model.layers.0.mlp.up_proj.weight" if len(shape) == 2 else "mlp.experts.up_proj"
    parts = {name: weight, f"{name}_scale_inv": inverse, "mlp.activation_scale": torch.ones(())}
    found = dequantized(parts, dtype, quant_method="fp8", weight_block_size=block)
    assert found.keys() == {name}
    assert_bits(found[name], expected)


@pytest.mark.parametrize("block", [(32, 32), (1, 64), (1, 32), (64, 1)])
def test_the_last_blocks_of_fp8_may_be_smaller(block: tuple[int, int]) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows, which transformers' own tool does not divide. Two
    blocks of 64 and 36 columns are not two of 50."""
    height, width = block
    weight, inverse = fp8(80, 100), scales(-(-80 // height), -(-100 // width))
    rows, columns = torch.arange(80) // height, torch.arange(100) // width
    expected = (weight.float() * inverse[rows][:, columns]).to(BF16)
    parts = {"a.weight": weight, "a.weight_scale_inv": inverse}
    found = dequantized(parts, quant_method="fp8", weight_block_size=[*block])
    assert_bits(found["a.weight"], expected)


@pytest.mark.parametrize("dtype", ["ue8m0", "bytes", "fp4"])
def test_scales_that_are_powers_of_two(dtype: str) -> None:
    """Scales as exponents, and DeepSeek-V4's experts with two numbers in a byte."""
    exponents = torch.randint(100, 140, (4, 2), dtype=torch.uint8)
    packed = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    weight = packed if dtype == "fp4" else fp8(64, 64)
    inverse = exponents if dtype == "bytes" else exponents.view(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(None)._dequantize_one(weight, inverse, BF16)
    found = dequantized({"a.weight": weight, "a.scale": inverse}, quant_method="fp8")
    assert_bits(found["a.weight"], expected)


def test_mxfp4_is_dequantized_as_transformers_does() -> None:
    """Every byte, every exponent whose products are finite, and no dtype in the config, as in
    gpt-oss."""
    blocks = torch.randint(0, 256, (3, 80, 4, 16), dtype=torch.uint8)
    blocks.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    exponents = torch.randint(0, 250, (3, 80, 4), dtype=torch.uint8)
    exponents.view(-1)[:250] = torch.arange(250, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {
        f"{name}_blocks": blocks,
        f"{name}_scales": exponents,
        f"{name}_bias": random(3, 80).to(BF16),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    found, left = dequantize_tensors(lazy(parts), config)
    assert left == {"model_type": "gpt_oss"}
    assert found.keys() == {name, f"{name}_bias"}
    assert_bits(found[name], convert_moe_packed_tensors(blocks, exponents, dtype=BF16))


def group(strategy: str, bits: int = 8, kind: str = "int", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | more
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize("scale_dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "strategy", "grid"),
    [
        ("float", "tensor", (1,)),
        ("float", "channel", (64, 1)),
        ("float", "block", (2, 2)),
        ("int", "channel", (64, 1)),
        ("int", "group", (64, 3)),
    ],
)
def test_compressed_fp8_and_int8(
    kind: str, strategy: str, grid: tuple[int, ...], scale_dtype: torch.dtype
) -> None:
    weight = fp8(64, 48) if kind == "float" else torch.randint(-128, 128, (64, 48)).to(torch.int8)
    scale = scales(*grid, dtype=scale_dtype)
    spread = (scale.view(1, 1) if strategy == "tensor" else scale).repeat_interleave(
        64 // (grid[0] if len(grid) > 1 else 1), 0
    )
    spread = spread.repeat_interleave(48 // spread.shape[1], 1)
    expected = (weight.to(scale_dtype) * spread).to(BF16)
    parts = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": torch.ones(1)}
    scheme = group(strategy, 8, kind, block_structure=[32, 24] if strategy == "block" else None)
    found = dequantized(parts, **COMPRESSED, **scheme, format=f"{kind}-quantized")
    assert found.keys() == {"a.weight"}
    assert_bits(found["a.weight"], expected)


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of each row, one number after the other."""
    per_word = 32 // bits
    words = torch.zeros(len(numbers), -(-numbers.shape[1] // per_word), dtype=torch.int64)
    for column in range(numbers.shape[1]):
        unsigned = numbers[:, column].long() + 2 ** (bits - 1)
        words[:, column // per_word] += unsigned << (column % per_word * bits)
    return words.to(torch.int32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "columns"), [(4, 96), (4, 100), (8, 96)])
def test_compressed_integers_in_words(bits: int, columns: int, symmetric: bool) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    numbers, zeros = torch.randint(low, high, (44, columns)), torch.randint(low, high, (44, 4))
    scale = scales(44, 4, dtype=BF16)
    spread = [each.repeat_interleave(columns // 4, 1) for each in (scale, zeros)]
    shifted = numbers.to(BF16) - (0 if symmetric else spread[1].to(BF16))
    parts = {
        "a.weight_packed": pack(numbers, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([44, columns]),
        "a.weight_g_idx": torch.arange(columns, dtype=torch.int32) // (columns // 4),
        "a.bias": random(44),
    }
    if not symmetric:
        parts["a.weight_zero_point"] = pack(zeros.T, bits).T.contiguous()
    scheme = group("group", bits, group_size=columns // 4, symmetric=symmetric)
    found = dequantized(parts, **COMPRESSED, **scheme, format="pack-quantized")
    assert found.keys() == {"a.bias", "a.weight"}
    assert_bits(found["a.weight"], shifted * spread[0])


def test_scales_of_fbgemm_and_modelopt() -> None:
    weight = fp8(64, 48)
    for scheme, scale in (
        ({"quant_method": "fbgemm_fp8"}, scales(64, 1)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, scales()),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, scales(2, 1, 3, 1)),
    ):
        grid = scale.squeeze() if scale.ndim == 4 else scale
        expected = Fp8Dequantize(None)._dequantize_one(weight, grid, BF16)
        parts = {"a.weight": weight, "a.weight_scale": scale, "a.k_scale": torch.ones(())}
        assert_bits(dequantized(parts, **scheme)["a.weight"], expected)


def test_fp8_that_no_config_mentions() -> None:
    weight, scale = fp8(64, 48), scales(64, 1)
    expected = (weight.float() * scale).to(BF16)
    stored = lazy({"a.weight": weight, "a.weight_scale": scale, "norm.weight": random(48).to(BF16)})
    assert_bits(dequantize_tensors(stored, {})[0]["a.weight"], expected)
    del stored["a.weight_scale"]
    with pytest.raises(UserError, match=r"a\.weight is float8_e4m3fn, .* no a\.weight_scale"):
        dequantize_tensors(stored, {"dtype": "bfloat16"})
    assert dequantize_tensors(stored, {"dtype": "float8_e4m3fn"})[0] == stored


PACKED = {"a.weight_packed": torch.zeros(4, 2, dtype=torch.int32), "a.weight_scale": scales(4, 1)}
SHAPE = {"a.weight_shape": torch.tensor([4, 16])}
SCALED = {"a.weight": fp8(4, 6), "a.weight_scale": scales(4, 1)}


@pytest.mark.parametrize(
    ("parts", "scheme", "message"),
    [
        (SCALED, {"quant_method": "gptq"}, r"quant_method gptq .*packed.* → use the folder"),
        (SCALED, COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
        (SCALED, COMPRESSED | {"sparsity_config": {"format": "marlin_24"}}, "marlin_24 cannot"),
        (SCALED, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo NVFP4 cannot"),
        (SCALED, {"quant_method": "fp8", "weight_block_size": [0, 9]}, r"block size \[0, 9\]"),
        (
            SCALED | {"a.weight_scale": scales(3, 4)},
            {"quant_method": "fp8"},
            r"\[4, 6\] is not divided into blocks by a\.weight_scale \[3, 4\]",
        ),
        (SCALED | {"b.weight_scale": scales(4, 1)}, {"quant_method": "fp8"}, "b.weight_scale is "),
        (PACKED, COMPRESSED | group("channel", 4), "a.weight_shape is missing"),
        (PACKED | SHAPE, COMPRESSED | group("channel", 8), r"does not contain the \[4, 16\]"),
        (
            PACKED | SHAPE | {"a.weight_g_idx": torch.arange(16) % 2},
            COMPRESSED | group("group", 4),
            "actorder: group",
        ),
        (
            {"a_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)},
            {"quant_method": "mxfp4"},
            "a_proj_scales is missing",
        ),
    ],
)
def test_what_cannot_be_dequantized(parts: Parts, scheme: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dequantized(parts, **scheme)
