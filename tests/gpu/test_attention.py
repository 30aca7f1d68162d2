"""Attention tests that need a GPU: flash attention 2 from the package flash-attn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.cluster.devices import has_flash_attention
from tests.helpers.commands import losses, shardway

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not has_flash_attention(), reason="flash-attn is not installed"),
]


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_flash_attention_gives_the_losses_of_sdpa(
    tiny: Path, tmp_path: Path, strategy: str, precision: str
) -> None:
    rows = 8 * torch.cuda.device_count()
    for attention in ("sdpa", "flash_attention_2"):
        done = shardway(
            *("train", "model=tiny", f"model.attention={attention}", f"run_dir={attention}"),
            *(f"strategy={strategy}", f"precision={precision}"),
            *(f"training.global_batch_size={rows}", "training.micro_batch_size=4"),
            *("training.epochs=null", "training.max_steps=5", "optimizer.learning_rate=1e-3"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "flash_attention_2")
    assert found == pytest.approx(losses(tmp_path / "sdpa"), rel=2e-2)
    assert found[-1] < found[0]
