"""Weights that are quantized again, in the format of their base."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from launcher.errors import UserError
from launcher.export.assembled import Assembled
from launcher.export.base_format import in_base_format
from launcher.export.quantized import dequantize_tensors, requantize
from launcher.export.quantized.packed import E2M1, pack_floats, pack_integers
from launcher.io.readers.safetensors_file import read_header
from launcher.io.tensor import Tensor, in_memory
from tests.export.test_released_formats import (
    BF16,
    COMPRESSED,
    Parts,
    fp8,
    group,
    lazy,
    pack,
    random,
    scales,
)

NAME = "model.layers.0.mlp.up_proj.weight"


def written(parts: Parts, new: torch.Tensor | None, name: str = NAME, **scheme: Any) -> Parts:
    """What is written for a base of `parts` whose weight became `new`; None: it is unchanged.

    Each tensor is compared with the slow implementation, and read in tiles.
    """
    stored = lazy(parts)
    config = {"dtype": "bfloat16", "quantization_config": scheme, "vocab_size": 9}
    base, plain = dequantize_tensors(stored, config)
    tensors = dict(base)
    if new is not None:
        tensors[name] = in_memory(name, new, Path("trained"))
    actions = {each: "merged" if tensors[each] is not base[each] else "copied" for each in base}
    found = in_base_format(Assembled(tensors, actions, plain), base, stored, config)
    assert found.config == config
    assert found.actions.keys() == found.tensors.keys() == parts.keys()
    return {each: checked(tensor) for each, tensor in found.tensors.items()}


def checked(tensor: Tensor) -> torch.Tensor:
    values = tensor.read_all()
    flat = values.reshape(tensor.rows, tensor.columns)
    cuts = sorted({0, tensor.rows // 3, tensor.rows // 2 + 1, tensor.rows})
    for first, last in itertools.pairwise(cuts):
        assert torch.equal(bits(tensor.read(first, last)), bits(flat[first:last]))
        again = tensor.reference(first, last).to(tensor.dtype)
        assert torch.equal(bits(again), bits(flat[first:last]))
    return values


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8) if values.dtype.itemsize == 1 else values


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [((256, 384), (2, 3), [128, 128]), ((2, 96, 64), (2, 3, 2), [32, 32]), ((80, 48), (), None)],
)
def test_fp8_is_quantized_as_transformers_does(
    shape: tuple[int, ...], grid: tuple[int, ...], block: Any
) -> None:
    new = (random(*shape) * 0.02).to(BF16)
    new.view(-1, shape[-1])[:32, :32] = 0  # a block of zeros, if blocks are small
    settings = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    expected = quantize._quantize_one(NAME, new)
    inverse = f"{NAME}_scale_inv"
    parts = {NAME: fp8(*shape), inverse: scales(*grid), "a.input_scale": torch.ones(())}
    found = written(parts, new, quant_method="fp8", weight_block_size=block)
    assert torch.equal(bits(found[NAME]), bits(expected[NAME]))
    assert torch.equal(found[inverse], expected[inverse.replace("weight_", "weight_")].view(grid))
    kept = written(parts, None, quant_method="fp8", weight_block_size=block)
    assert all(
        kept[each] is not None and torch.equal(bits(kept[each]), bits(parts[each]))
        for each in parts
    )


def test_fp8_with_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """As exponents in a file, in transformers' arithmetic."""
    new = (random(64, 48) * 0.02).to(BF16)
    settings = SimpleNamespace(weight_block_size=[16, 16], scale_fmt="ue8m0")
    expected = Fp8Quantize(SimpleNamespace(quantization_config=settings))._quantize_one(NAME, new)
    inverse = f"{NAME}_scale_inv"
    exponents = torch.randint(100, 140, (4, 3), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file({NAME: fp8(64, 48), inverse: exponents}, tmp_path / "model.safetensors")
    parts = {name: t.read_all() for name, t in read_header(tmp_path / "model.safetensors").items()}
    found = written(parts, new, quant_method="fp8", weight_block_size=[16, 16])
    assert torch.equal(bits(found[NAME]), bits(expected[NAME]))
    assert torch.equal(bits(found[inverse]), bits(expected[inverse]))


def test_mxfp4_loses_nothing_that_it_can_store() -> None:
    """Values that a base in MXFP4 had are stored exactly, whatever the scales."""
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.randint(0, 256, (3, 80, 4, 16), dtype=torch.uint8)
    exponents = torch.randint(90, 140, (3, 80, 4), dtype=torch.uint8)
    new = convert_moe_packed_tensors(blocks, exponents, dtype=BF16)
    shifted = {f"{name}_blocks": blocks, f"{name}_scales": exponents + 3}
    found = written(shifted, new, name, quant_method="mxfp4")
    again = convert_moe_packed_tensors(found[f"{name}_blocks"], found[f"{name}_scales"], dtype=BF16)
    assert torch.equal(again, new)


def test_mxfp4_rounds_to_the_nearest_number() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    parts = {
        f"{name}_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8),
        f"{name}_scales": torch.zeros(1, 2, 1, dtype=torch.uint8),
    }
    row = torch.tensor([6.0, 0.25, 0.3, -0.75, 1.25, 1.3, 2.5, 3.5, -5.0, 4.9, 0.2] + [0.0] * 21)
    nearest = torch.tensor([6.0, 0, 0.5, -1, 1, 1.5, 2, 4, -4, 4, 0] + [0.0] * 21)
    found = written(parts, torch.stack([row, row * 8]).T[None].to(BF16), name, quant_method="mxfp4")
    again = convert_moe_packed_tensors(found[f"{name}_blocks"], found[f"{name}_scales"], dtype=BF16)
    assert torch.equal(again, torch.stack([nearest, nearest * 8]).T[None].to(BF16))


@pytest.mark.parametrize(
    ("kind", "bits_", "strategy", "grid"),
    [
        ("float", 8, "tensor", (1,)),
        ("float", 8, "channel", (44, 1)),
        ("int", 8, "channel", (44, 1)),
        ("int", 4, "group", (44, 3)),
    ],
)
def test_compressed_weights_are_quantized_to_the_nearest_number(
    kind: str, bits_: int, strategy: str, grid: tuple[int, ...]
) -> None:
    """Also those of a base that were never changed are found again."""
    new, scale = (random(44, 96) * 0.02).to(BF16), scales(*grid, dtype=BF16)
    numbers = torch.randint(-(2 ** (bits_ - 1)), 2 ** (bits_ - 1), (44, 96))
    scheme = COMPRESSED | group(strategy, bits_, kind)
    if bits_ == 4:
        parts = {f"{NAME}_packed": pack(numbers, 4), f"{NAME}_shape": torch.tensor([44, 96])}
    else:
        parts = {NAME: fp8(44, 96) if kind == "float" else numbers.to(torch.int8)}
    parts[f"{NAME}_scale"] = scale
    found = written(parts, new, **scheme)
    assert found.keys() == parts.keys()
    again, _ = dequantize_tensors(lazy(found), {"dtype": "bfloat16", "quantization_config": scheme})
    step = found[f"{NAME}_scale"].float().view(-1, grid[-1]).repeat_interleave(96 // grid[-1], 1)
    error = (again[NAME].read_all().float() - new.float()).abs()
    nearest = step / 2 if kind == "int" else new.float().abs() / 16 + step * 2**-9
    assert (error <= nearest * 1.02 + new.float().abs() * 2**-8).all()
    assert written(parts, None, **scheme).keys() == parts.keys()


@dataclass(frozen=True, eq=False)
class Counted(Tensor):
    """`source`, and how many of its rows were read."""

    source: Tensor
    rows_read: list[int]

    def read_into(self, out: torch.Tensor, first: int) -> None:
        self.rows_read.append(len(out))
        self.source.read_into(out, first)

    def reference(self, first: int, last: int) -> torch.Tensor:
        return self.source.reference(first, last)

    def files(self) -> Iterator[Path]:
        return self.source.files()


@pytest.mark.parametrize(
    ("rows", "block", "large"),
    [(517, [128, 128], False), (517, [16, 16], False), (517, [1, 32], False), (517, None, True)],
)
def test_what_is_quantized_is_computed_once(
    rows: int, block: list[int] | None, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For numbers and scales together; twice where the blocks are too large to be kept."""
    monkeypatch.setattr(requantize, "SPAN_ELEMENTS", 1 << 13)
    if large:
        monkeypatch.setattr(requantize, "SPAN_BLOCK_ELEMENTS", 1 << 14)
    columns = 80
    grid = (-(-rows // block[0]), -(-columns // block[1])) if block else ()
    parts = {NAME: fp8(rows, columns), f"{NAME}_scale_inv": scales(*grid)}
    scheme: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": block}
    config = {"dtype": "bfloat16", "quantization_config": scheme}
    base, plain = dequantize_tensors(lazy(parts), config)
    new = (random(rows, columns) * 0.02).to(BF16)
    counted = Counted(NAME, BF16, new.shape, in_memory(NAME, new, Path("trained")), [])
    assembled = Assembled({NAME: counted}, {NAME: "merged"}, plain)
    found = in_base_format(assembled, base, lazy(parts), config).tensors
    values = {name: tensor.read_all() for name, tensor in found.items()}
    assert sum(counted.rows_read) <= rows * (2 if large else 1) + 64
    for name, each in written(parts, new, **scheme).items():
        assert torch.equal(bits(values[name]), bits(each))
    alone = Counted(NAME, BF16, new.shape, in_memory(NAME, new, Path("trained")), [])
    assembled = Assembled({NAME: alone}, {NAME: "merged"}, plain)
    again = in_base_format(assembled, base, lazy(parts), config).tensors
    assert torch.equal(again[f"{NAME}_scale_inv"].read_all(), values[f"{NAME}_scale_inv"])


def test_fp4_next_to_and_halfway_between_its_numbers() -> None:
    codes = torch.arange(8.0)
    halfway = (torch.tensor(E2M1)[1:] + torch.tensor(E2M1)[:-1]) / 2
    points = torch.cat([torch.tensor(E2M1), halfway, torch.tensor([7.0, 1e30, 1e-30])])
    near = [points, *(points.nextafter(torch.tensor(side)) for side in (torch.inf, 0.0))]
    sizes = torch.cat(near)
    sizes = torch.cat([sizes, -sizes, random(2048) * 3])
    distances = (sizes.double().abs()[:, None].clamp(max=6) - torch.tensor(E2M1).double()).abs()
    is_nearest = distances == distances.amin(1, keepdim=True)
    even_first = torch.where(is_nearest, codes % 2 * 8 + codes, 99).argmin(1)
    expected = even_first.to(torch.uint8) + (sizes.signbit().to(torch.uint8) << 3)
    packed = pack_floats(sizes[None])
    assert torch.equal(torch.stack([packed & 15, packed >> 4], -1).view(-1), expected)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_integers_are_packed_as_they_are_read(width: int) -> None:
    half, columns = 1 << width - 1, 3 * 32 // width - (1 if width < 8 else 2)
    numbers = torch.randint(-half, half, (5, columns))
    words = pack_integers(numbers.float(), width, 3)
    assert torch.equal(words, pack(numbers, width))


def test_what_is_not_written_in_its_own_format() -> None:
    zeros = {
        f"{NAME}_packed": pack(torch.zeros(8, 96), 4),
        f"{NAME}_shape": torch.tensor([8, 96]),
        f"{NAME}_scale": scales(8, 1),
        f"{NAME}_zero_point": pack(torch.zeros(1, 8), 4).T.contiguous(),
    }
    scheme = COMPRESSED | group("channel", 4, symmetric=False)
    with pytest.raises(UserError, match=r"has zero points .* → --dtype bf16"):
        written(zeros, torch.zeros(8, 96, dtype=BF16), **scheme)
    parts = {NAME: fp8(8, 4), f"{NAME}_scale": scales(8, 1)}
    with pytest.raises(UserError, match=r"is \[9, 4\] and quantized as \[8, 4\] in the base"):
        written(parts, torch.zeros(9, 4, dtype=BF16), quant_method="fp8")
