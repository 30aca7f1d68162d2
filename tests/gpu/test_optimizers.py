"""Optimizer tests that need a GPU: paging, and bitsandbytes' CUDA kernels."""

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


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        *(("adamw_paged", strategy) for strategy in ("ddp", "fsdp", "zero2", "zero3")),
        *(("adamw_8bit", strategy) for strategy in ("ddp", "fsdp")),
        *(("lion", strategy) for strategy in ("fsdp", "zero3")),
        ("sgd", "fsdp"),
        ("adafactor", "ddp"),
    ],
)
def test_stop_and_resume_gives_the_losses_of_one_run(
    tiny: Path, tmp_path: Path, method: str, optimizer: str, strategy: str
) -> None:
    rows = 8 * torch.cuda.device_count()
    options = (
        *("train", "model=tiny", f"method={method}", f"strategy={strategy}", "precision=bf16"),
        *(f"optimizer={optimizer}", f"training.global_batch_size={rows}"),
        *("training.epochs=null", "training.max_steps=6", "optimizer.learning_rate=1e-3"),
    )
    commands = (
        ("run_dir=whole",),
        ("run_dir=parts", "training.stop_after_steps=3"),
        ("run_dir=parts", "resume=auto"),
    )
    for command in commands:
        done = shardway(*options, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    assert [r["loss"] for r in parts if "loss" in r] == [r["loss"] for r in whole if "loss" in r]
