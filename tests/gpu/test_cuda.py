"""Tests that need a GPU: NCCL, fp16 under ZeRO, bitsandbytes' CUDA kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import shardway

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


STRATEGIES = ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("full", "fp32"),
        ("full", "bf16"),
        ("full", "fp16"),
        ("full", "pure_bf16"),
        ("freeze", "bf16"),
        ("lora", "bf16"),
        ("lora", "fp16"),
        ("qlora", "bf16"),
        ("qlora", "fp16"),
    ],
)
def test_every_gpu_trains_and_the_result_can_be_served(
    tiny: Path, tmp_path: Path, method: str, strategy: str, precision: str
) -> None:
    rows = 8 * torch.cuda.device_count()
    done = shardway(
        *("train", "model=tiny", f"method={method}", f"strategy={strategy}", "run_dir=run"),
        *(f"precision={precision}", f"training.global_batch_size={rows}"),
        *("training.epochs=null", "training.max_steps=5", "optimizer.learning_rate=1e-3"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on cuda" in done.stdout
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["loss"] < records[0]["loss"]
    done = shardway("consolidate", "run", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = shardway("chat", "out", "--question", "hi", "--max-new-tokens", "2", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
