"""A real model in 4 bits is fine-tuned on the bundled rows, and its exports answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import shardway
from tests.helpers.demo import wrong_answers


@pytest.mark.whole
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_smollm2_in_4_bits_learns_and_its_exports_answer(
    cache: Path, tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    learned = shardway(
        "train", "experiment=demo", "method=qlora", f"strategy={strategy}",
        *(["strategy.reshard_after_forward=false"] if strategy == "fsdp" else
          ["~strategy.reshard_after_forward"]),
        f"run_dir={run}", cwd=tmp_path, patience=1000,
    )  # fmt: skip
    assert learned.returncode == 0, learned.stdout + learned.stderr
    assert "210 linear weights, 212.3 MB, quantized to" in learned.stdout
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0] / 2
    for base in ("original", "dequantized"):
        to = tmp_path / base
        done = shardway("consolidate", run, "--qlora-base", base, "--output", to, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        wrong = wrong_answers(to)
        assert not wrong, "\n".join([base, *wrong])
