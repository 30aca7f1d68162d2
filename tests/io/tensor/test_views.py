"""torch code gives the same results on stand-ins as on the tensors themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.export.names.trace import trace
from launcher.io.readers.safetensors_file import read_header
from launcher.io.tensor import Tensor, in_memory, views

Code = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]

CODES: dict[str, tuple[tuple[int, ...], Code]] = {
    "experts fused": (
        (6, 5),
        lambda a, b: [torch.cat([torch.stack([a, b]), torch.stack([b, a])], 1)],
    ),
    "experts split": (
        (4, 6, 5),
        lambda a, b: [t.squeeze(0) for t in a.chunk(2, dim=1)[1].chunk(4)],
    ),
    "a thin expert": ((4, 1, 5), lambda a, b: [t.squeeze(0) for t in torch.chunk(a, 4, dim=0)]),
    "columns joined": ((4, 6, 5), lambda a, b: [torch.cat([a, b], dim=-1)]),
    "columns cut": ((4, 6, 5), lambda a, b: list(torch.split(a, [2, 3], dim=2))),
    "columns cut and joined": ((6, 4), lambda a, b: [torch.cat([*a.chunk(2, 1), b], dim=1)]),
    "matrices transposed": ((3, 70, 50), lambda a, b: [a.transpose(1, 2).contiguous()]),
    "rows exchanged": ((3, 4, 5), lambda a, b: [a.transpose(0, 1)]),
    "interleaved": ((8, 5), lambda a, b: [a.reshape(4, 2, 5).transpose(0, 1).reshape(8, 5)]),
    "a bias for rotary": ((12,), lambda a, b: [a.view(3, 2, 2).transpose(1, 2).reshape(12)]),
    "a convolution": ((6, 12), lambda a, b: [a.reshape(6, 3, 2, 2)]),
    "three of a vector": ((9,), lambda a, b: [*torch.chunk(a, 3), torch.cat([a, b])]),
    "unbound": ((3, 4, 5), lambda a, b: [*torch.unbind(a), *a.unbind(dim=1)]),
    "stacked elsewhere": ((3, 4), lambda a, b: [torch.stack([a, b], dim=1)]),
    "stacked along columns": ((3, 4), lambda a, b: [torch.stack([a, b], dim=2)]),
}


@pytest.mark.parametrize("code", CODES)
def test_the_values_equal_those_of_torch(code: str, tmp_path: Path) -> None:
    shape, run = CODES[code]
    real = {name: torch.randn(shape).bfloat16() for name in "ab"}
    save_file(real, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    expected = run(real["a"], real["b"])
    for tensor, values in zip(
        (each.lazy for each in run(trace(stored["a"]), trace(stored["b"]))), expected, strict=True
    ):
        assert (tensor.shape, tensor.dtype) == (tuple(values.shape), values.dtype)
        assert torch.equal(tensor.read_all(), values)
        matrix = values.reshape(tensor.rows, tensor.columns)
        first = random.Random(code).randrange(tensor.rows)
        last = random.Random(code).randrange(first, tensor.rows) + 1
        assert torch.equal(tensor.read(first, last), matrix[first:last])
        assert torch.equal(tensor.reference(first, last), matrix[first:last].double())
        assert torch.equal(tensor.to(torch.float32).read_all(), values.float())
        assert set(tensor.files()) <= {tmp_path / "x.safetensors"} != set()


@pytest.mark.parametrize(
    "back_and_forth",
    [
        lambda t: torch.cat(list(t.chunk(3, dim=1)), dim=1),
        lambda t: torch.cat(list(t.chunk(2, dim=2)), dim=2),
        lambda t: torch.stack(list(t.unbind())),
        lambda t: t.transpose(1, 2).transpose(1, 2),
        lambda t: t.reshape(4, 36).reshape(4, 6, 6),
        lambda t: t.transpose(0, 1).transpose(0, 1),
    ],
)
def test_splitting_and_joining_returns_the_tensor_itself(
    back_and_forth: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    tensor: Tensor = in_memory("t", torch.randn(4, 6, 6), Path("x"))
    assert back_and_forth(trace(tensor)).lazy is tensor


def test_a_result_that_does_not_fit_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = trace(in_memory("t", torch.randn(4, 60, 6), Path("x")))
    with pytest.raises(UserError, match=r"t: dims 0 and 2 .* cannot be exchanged"):
        tensor.transpose(0, 2)
    with pytest.raises(UserError, match="torch's relu"):
        tensor.relu()
    monkeypatch.setattr(views, "MAX_MATRIX_BYTES", 60 * 6 * 4 - 1)
    with pytest.raises(UserError, match=r"t .* must be transposed"):
        tensor.transpose(1, 2)
    monkeypatch.setattr(views, "MAX_PARTS", 100)
    with pytest.raises(UserError, match="t: its conversion needs more than 100 slices"):
        tensor.transpose(0, 1)
