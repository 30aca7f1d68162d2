"""Trackers receive the values of metrics.jsonl, also when a run is stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.cluster.devices import missing_packages
from launcher.folders.run import RunDir
from tests.helpers.commands import TRAIN_TINY, metrics, shardway
from tests.helpers.tracking import in_wandb, scalars


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trackers_receive_the_values_of_metrics_jsonl(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = not missing_packages(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = shardway(
        *(*TRAIN_TINY, "cluster.cpu_processes=1", "run_dir=run", "data.eval_rows=5"),
        *("training.eval_steps=2", "tracking.peak_tflops=0.5"),
        *("training.epochs=null", "training.max_steps=5", "training.stop_after_steps=3"),
        f"tracking.trackers=[{'tensorboard,wandb' if wandb else 'tensorboard'}]",
        cwd=tmp_path,
        patience=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = shardway("resume", "run", cwd=tmp_path, patience=500)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / "run")
    expected = figures(metrics(run.path))
    assert [step for step, _ in expected["loss"]] == [1, 2, 3, 4, 5]
    assert expected["eval_loss"]
    assert all(0 < share < 1 for _, share in expected["mfu"])
    shown = {tag: [(s, float(np.float32(v))) for s, v in vs] for tag, vs in expected.items()}
    assert scalars(run) == shown, "TensorBoard's scalars have 32 bits"
    if wandb:
        assert in_wandb(run) == expected


def figures(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Map each field to the (step, value) pairs of the lines that contain it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key not in ("step", "time"):
                found.setdefault(key, []).append((record["step"], value))
    return found
