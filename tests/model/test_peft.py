"""PEFT is imported without the libraries that it would load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher.model.peft import hide_package

WRAPPED = """
import sys
import launcher.training.build
from importlib.util import find_spec
from torch import nn
from launcher.model.peft import PeftConfig, PeftLinear, get_peft_model
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), PeftConfig(target_modules=["0"]))
assert type(model.base_model.model[0]) is PeftLinear
assert find_spec("bitsandbytes"), "it is hidden from PEFT alone"
unneeded = {"bitsandbytes", "torch._inductor.compile_fx"}
assert not unneeded & set(sys.modules), unneeded & set(sys.modules)
import bitsandbytes.functional
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
get_peft_model(llama, PeftConfig(target_modules=["q_proj"]))
"""


@pytest.mark.slow
def test_wrapping_a_model_with_peft_loads_no_compiler_and_warns_of_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", WRAPPED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


def test_only_modules_that_are_not_loaded_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with hide_package("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with hide_package("colorsys"):
        assert sys.modules["colorsys"] is colorsys
    assert sys.modules["colorsys"] is colorsys
