"""Linear layers whose weight a model uses without calling them: no adapter, and not quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.config.schema.method import LoraConfig, QloraConfig
from launcher.errors import UserError
from launcher.method import build_method
from launcher.model.adaptable import unadaptable_linears
from launcher.model.quantized_linear import QuantizedLinear
from tests.helpers.tiny_models import tiny_config

PASSED_BY: dict[str, set[str]] = {
    "jamba": {"dt_proj"},
    "mamba": {"dt_proj", "x_proj", "out_proj"},
    "llama4_text": {"router"},
    "bloom": set(),  # it has another way to multiply, which is off
    "deepseek_v32": set(),  # it reads the dtype of a weight
}


def build(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)


@pytest.mark.parametrize("model_type", PASSED_BY)
def test_they_are_found(model_type: str) -> None:
    found = {name.rpartition(".")[2] for name in unadaptable_linears(build(model_type))}
    assert found == PASSED_BY[model_type]


@pytest.mark.parametrize(("model_type", "name"), [("jamba", "dt_proj"), ("mamba", "x_proj")])
def test_their_names_are_refused(model_type: str, name: str) -> None:
    method = build_method(LoraConfig(name="lora", target_modules=[name]))
    with pytest.raises(UserError, match=f"an adapter of {name} would have no effect"):
        method.prepare(build(model_type), 0)


@pytest.mark.parametrize("model_type", ["jamba", "llama4_text"])
def test_they_keep_their_weights_under_qlora(model_type: str) -> None:
    """Their model cannot compute with packed bits."""
    model = build(model_type)
    passed_by = unadaptable_linears(model)
    method = build_method(QloraConfig(name="qlora", target_modules=["q_proj"]))
    wrapped: Any = method.prepare(model, 0)
    kinds = {name: type(module) for name, module in wrapped.get_base_model().named_modules()}
    assert not any(kinds[name] is QuantizedLinear for name in passed_by)
    assert any(kind is QuantizedLinear for kind in kinds.values())
    assert method.quantization_scheme is not None
    assert set(passed_by) <= set(method.quantization_scheme["llm_int8_skip_modules"])
    assert wrapped(input_ids=torch.arange(3, 40).view(1, -1)).logits.isfinite().all()
