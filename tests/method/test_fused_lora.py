"""Fused LoRA layers compute the same as PEFT's layers, and remain PEFT layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.method.fused_lora import AddmmLinear, FusedLoraLinear, fuse_adapters
from launcher.method.peft_tensors import ADAPTER_NAME
from tests.helpers import parts
from tests.helpers.parts import Case


def model_of(tiny: Path, rows_file: Path, method: str = "lora", **options: Any) -> Any:
    """A model with a nonzero adapter, in PEFT's own layers."""
    case = Case(tiny, rows_file, method=method, method_options=options)
    model = parts.plain_model(case)
    draw = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.05, generator=draw)
    return model.train()


def step(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


IDS = torch.arange(3, 3 + 48).view(2, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("lora", {"rslora": True}), ("qlora", {})]
)
def test_fused_arithmetic_equals_peft(
    tiny: Path, rows_file: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    ours = model_of(tiny, rows_file, method, **options)
    exact = step(copy.deepcopy(ours), IDS)
    for parameter in filter(torch.is_floating_point, ours.parameters()):
        parameter.data = parameter.data.to(dtype)
    theirs = copy.deepcopy(ours)
    assert fuse_adapters(ours) == sum(isinstance(m, PeftLinear) for m in theirs.modules()) > 0
    found, peft_s = step(ours, IDS), step(theirs, IDS)
    assert found.keys() == peft_s.keys()

    def apart(from_exact: dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = [(from_exact[name].float(), expected) for name, expected in exact.items()]
        return torch.stack([(found - e).norm() / e.norm() for found, e in pairs])

    if dtype == torch.float32:
        assert apart(found).max() < 1e-5
    else:
        assert apart(found).mean() <= 1.15 * apart(peft_s).mean()
        assert (apart(found) <= 1.5 * apart(peft_s) + 1e-3).all()


class Made(TorchDispatchMode):
    """Counts newly created tensors that are as wide as a layer's output."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if torch.is_tensor(made) and made.numel() == self.elements:
            here = {each.untyped_storage().data_ptr() for each in args if torch.is_tensor(each)}
            self.count += made.untyped_storage().data_ptr() not in here
        return made


def test_a_layer_creates_its_output_once(tiny: Path, rows_file: Path) -> None:
    model = model_of(tiny, rows_file)
    layer = next(m for m in model.modules() if type(m) is PeftLinear)
    x = torch.randn(3, 7, layer.in_features)
    counts = {}
    for kind in ("peft", "ours"):
        with Made(3 * 7 * layer.out_features) as made:
            layer(x)
        counts[kind] = made.count
        fuse_adapters(model)
    assert counts["ours"] == 1
    assert counts["peft"] >= 4


def test_variants_of_lora_keep_peft_layers(tiny: Path, rows_file: Path) -> None:
    for options in ({"dropout": 0.1}, {"dora": True}):
        assert fuse_adapters(model_of(tiny, rows_file, **options)) == 0
    assert fuse_adapters(parts.plain_model(Case(tiny, rows_file, method="full"))) == 0


def test_saving_merging_disabling_and_loading_still_work(
    tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = model_of(tiny, rows_file).eval()
    plain = copy.deepcopy(model)
    fuse_adapters(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    before = model(input_ids=IDS).logits
    with model.disable_adapter():
        off = model(input_ids=IDS).logits
    with plain.disable_adapter():
        assert torch.equal(off, plain(input_ids=IDS).logits)
    assert not torch.equal(off, before)
    model.save_pretrained(tmp_path)
    base = parts.plain_model(Case(tiny, rows_file, method="full"))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, before)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_inputs_in_another_dtype_use_peft_forward(tiny: Path, rows_file: Path) -> None:
    model = model_of(tiny, rows_file)
    fuse_adapters(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    assert isinstance(layer.lora_B[ADAPTER_NAME], AddmmLinear)
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
