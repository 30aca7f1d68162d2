"""Quantized weights equal bitsandbytes' to the bit, read in any way, and multiply correctly."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from bitsandbytes import functional as bits
from torch import nn
from torch.nn.functional import linear

from launcher.errors import UserError
from launcher.io.weight_views import read_flat_range, read_full
from launcher.model.bnb_formats import EightBit, FourBit
from launcher.model.lazy_weight import InParts, alone
from launcher.model.load import Slot
from launcher.model.quantized_linear import (
    QuantizationFormat,
    QuantizedLinear,
    QuantizedWeight,
    Scales,
    quantize,
)

CPU = torch.device("cpu")
SHAPES = [(40, 64), (48, 80), (16, 4096)]  # 80 columns: bitsandbytes' CPU kernel is wrong there
FORMATS = [
    FourBit("nf4", nested=True),
    FourBit("nf4", nested=False),
    FourBit("fp4", nested=True, storage=torch.bfloat16),
    EightBit(),
]


class InMemory:
    """A stored tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return self.tensor[tuple(slice(a, a + n) for a, n in zip(offsets, shape, strict=True))]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    made[0] = 0  # a block, and a row, of zeros
    return made.to(dtype)


def scales(form: QuantizationFormat, of: torch.Tensor) -> Scales:
    maxima = form.block_maxima(of.view(-1, form.block_size(of.shape)))
    return form.scales(maxima, of.shape)


def packed(form: QuantizationFormat, of: torch.Tensor) -> torch.Tensor:
    return read_full(QuantizedWeight(InMemory(of), form, CPU))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4bit_weights_equal_bitsandbytes(
    shape: tuple[int, int], kind: str, nested: bool, dtype: torch.dtype
) -> None:
    of, form = weight(shape, dtype), FourBit(kind, nested)
    expected, state = bits.quantize_4bit(of, compress_statistics=nested, quant_type=kind)
    assert torch.equal(packed(form, of), expected)
    absmax = state.absmax
    if nested:
        absmax = bits.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = torch.stack([expected.view(-1) >> 4, expected.view(-1) & 15], dim=1).view(-1).long()
    units = bits.get_4bit_type(kind, device="cpu")[codes].view(-1, 64)
    values = (units * absmax[:, None]).view(shape)
    found = scales(form, of).dequantize(expected, torch.float32)
    # the kernels' fp4 table has a few more digits
    torch.testing.assert_close(found, values, rtol=1e-4 if kind == "fp4" else 0, atol=0)
    assert (found - of.float()).abs().max() < of.abs().max() / 3


@pytest.mark.parametrize("shape", SHAPES)
def test_8bit_weights_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    of, form = weight(shape), EightBit()
    expected, absmax, _ = bits.int8_vectorwise_quant(of.half())
    assert torch.equal(packed(form, of), expected)
    found = scales(form, of).dequantize(expected, torch.float32)
    assert torch.equal(found, bits.int8_vectorwise_dequant(expected, absmax))
    assert (found - of.float()).abs().max() <= of.abs().max() / 200


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_rank_quantizes_its_range_like_the_full_weight(
    shape: tuple[int, int], form: QuantizationFormat
) -> None:
    stored = QuantizedWeight(InMemory(weight(shape)), form, CPU)
    whole = read_full(stored).view(-1)
    draw = random.Random(1)
    for _ in range(20):
        begin = draw.randrange(len(whole))
        count = draw.randrange(len(whole) - begin + 1)
        run = read_flat_range(stored, begin, count)
        assert run.dtype == stored.dtype
        assert torch.equal(run.view(torch.uint8), whole[begin : begin + count].view(torch.uint8))


class Slots:
    """Weights of one stored matrix, which three ranks read in parts."""

    def __init__(self, model: Model, of: torch.Tensor, in_parts: InParts) -> None:
        self.in_parts, self.id = in_parts, id(model.up.weight)
        self.slot = Slot(model.up, "weight", InMemory(of))

    def by_parameter(self) -> dict[int, Slot]:
        return {self.id: self.slot}


def of_three_ranks(count: int, compute: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    share = -(-count // 3)
    begins = [min(share * rank, count) for rank in range(3)]
    return torch.cat([compute(begin, min(share, count - begin)) for begin in begins])


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(48, 80), (2, 64), (16, 4096)])
def test_scales_that_ranks_compute_in_parts_are_those_of_the_whole_weight(
    form: QuantizationFormat, shape: tuple[int, int]
) -> None:
    of, dequantized = weight(shape), []
    for in_parts in (alone, of_three_ranks):
        model = Model()
        model.up = nn.Linear(shape[1], shape[0], device="meta")
        quantize(model, form, Slots(model, of, in_parts), CPU, [])  # type: ignore[arg-type]
        layer = model.up
        assert isinstance(layer, QuantizedLinear)
        dequantized.append(layer.scales.dequantize(packed(form, of), torch.float32))
    assert torch.equal(*dequantized)
    assert torch.equal(dequantized[0], scales(form, of).dequantize(packed(form, of), torch.float32))


def quantized_linear(form: QuantizationFormat, plain: nn.Linear) -> QuantizedLinear:
    of = plain.weight.detach()
    return QuantizedLinear(plain, packed(form, of), scales(form, of))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_the_dequantized_weight(
    form: QuantizationFormat, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(80, 48, dtype=dtype)
    layer = quantized_linear(form, plain)
    dequantized = layer.scales.dequantize(layer.weight, dtype)
    rows = torch.randn(2, 5, 80, dtype=dtype)
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    found = layer(ours)
    expected = linear(theirs, dequantized, plain.bias)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found.sum().backward()
    bias, plain.bias.grad = plain.bias.grad, None
    expected.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(bias, plain.bias.grad)
    assert layer.weight.grad is None


def test_backward_keeps_the_packed_parameter_and_not_the_weight() -> None:
    layer = quantized_linear(FourBit("nf4", nested=True), nn.Linear(80, 48))
    kept: list[torch.Tensor] = []
    pack: Callable[[torch.Tensor], torch.Tensor] = lambda t: kept.append(t) or t  # type: ignore[func-returns-value]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(3, 80, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr()]


class Model(nn.Module):
    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.up = nn.Linear(width, 48)
        self.head = nn.Linear(48, 64)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_all_linear_layers_except_the_head_and_kept_ones_are_quantized() -> None:
    model = Model()
    said = quantize(model, EightBit(), None, CPU, [])
    assert isinstance(model.up, QuantizedLinear)
    assert type(model.head) is nn.Linear
    assert said.startswith("1 linear weights, 0.0 MB, quantized to 0.0 MB")
    with pytest.raises(UserError, match="Model has no linear layer to quantize"):
        quantize(Model(), EightBit(), None, CPU, ["up"])


def test_modules_that_cannot_be_quantized_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="up has 624 elements, which is not a multiple of 64"):
        quantize(Model(13), FourBit("nf4", nested=True), None, CPU, [])
    broken = Model()
    broken.up.weight.data[3, 4] = torch.nan
    with pytest.raises(UserError, match="up has values that are not finite or too large"):
        quantize(broken, FourBit("nf4", nested=True), None, CPU, [])
    broken.up.weight.data[3, 4] = 1e5
    with pytest.raises(UserError, match="up has values that are not finite or too large"):
        quantize(broken, EightBit(), None, CPU, [])
