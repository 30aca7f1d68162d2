"""The benchmark of one GPU: its random model is valid, and its figures are correct."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def test_a_random_model_is_complete_and_its_shard_size_is_limited(
    tool: Any, tmp_path: Path
) -> None:
    tool("random_model").make("tiny", tmp_path / "model", shard_bytes=100_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert len(files) > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("abc", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
    with pytest.raises(UserError, match="is not empty"):
        tool("random_model").make("tiny", tmp_path / "model")


def test_flops_count_the_matrix_products_of_the_model(tool: Any, tmp_path: Path) -> None:
    tool("random_model").make("tiny", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    parameters = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = 2 * model.config.num_hidden_layers * model.config.hidden_size * 64
    count = tool("bench_gpu").flops_per_token
    assert count("tiny", 64, full=True) == 6 * parameters + 3 * attention
    assert count("tiny", 64, full=False) == 4 * parameters + 3 * attention


def test_a_rate_is_measured_from_the_end_of_a_block_of_records(tool: Any) -> None:
    times = [10.0, 10.0, 15.0, 15.0]  # log_steps=2
    records = [{"tokens": 100 * at, "time": time} for at, time in enumerate(times, start=1)]
    assert tool("bench_gpu").rate(records) == pytest.approx(200 / 5)
