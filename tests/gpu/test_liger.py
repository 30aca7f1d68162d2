"""Liger tests that need a GPU: its compiled kernels in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.cluster.devices import has_liger
from tests.helpers.commands import losses, shardway

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not has_liger(), reason="not installed: pip install 'shardway[liger]'"),
]


@pytest.mark.parametrize("setting", ["loss", "kernels"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
@pytest.mark.parametrize(("method", "precision"), [("full", "fp32"), ("lora", "bf16")])
def test_liger_gives_the_losses_of_torch(
    tiny: Path, tmp_path: Path, setting: str, strategy: str, method: str, precision: str
) -> None:
    rows = 8 * torch.cuda.device_count()
    for name, more in (("plain", ()), ("liger", (f"training.{setting}=liger",))):
        done = shardway(
            *("train", "model=tiny", f"method={method}", f"strategy={strategy}"),
            *(f"precision={precision}", f"run_dir={name}", *more),
            *(f"training.global_batch_size={rows}", "training.micro_batch_size=4"),
            *("training.epochs=null", "training.max_steps=5", "optimizer.learning_rate=1e-3"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "liger")
    assert found == pytest.approx(losses(tmp_path / "plain"), rel=2e-2)
    assert found[-1] < found[0]
