"""A run with rows that spoil it, through the launcher."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TRAIN_TINY, losses, metrics, shardway, status

pytestmark = [pytest.mark.slow, pytest.mark.whole]

WORDS = (
    *TRAIN_TINY,
    *("method=full", "strategy=ddp", "data=messages", "data.shuffle=false"),
    *("training.epochs=null", "training.max_steps=24", "training.global_batch_size=4"),
    *("optimizer.learning_rate=1e-2", "checkpoint.save_steps=6", "training.spike_window=8"),
)


def row(answer: str) -> dict[str, Any]:
    roles = ("user", "ask"), ("assistant", answer)
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """good.jsonl, and bad.jsonl, which has a batch of noise in it: that of step 21."""
    noise = random.Random(1)
    good = [row("yes yes yes")] * 120
    bad = [row("".join(chr(noise.randint(33, 126)) for _ in range(20))) for _ in range(4)]
    for name, rows in (("good", good), ("bad", good[:80] + bad + good[80:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_a_rewound_run_equals_one_without_the_rows_also_after_a_stop(
    tiny: Path, files: Path
) -> None:
    clean = shardway(*WORDS, "data.path=good.jsonl", "run_dir=clean", cwd=files)
    assert clean.returncode == 0, clean.stdout
    bad = (*WORDS, "data.path=bad.jsonl", "run_dir=run", "training.on_spike=rewind")
    first = shardway(*bad, "training.stop_after_steps=22", cwd=files)
    assert "step 21: loss " in first.stdout
    assert "training goes on from step-000018 without batch 20" in first.stdout
    second = shardway("resume", "run", cwd=files)
    assert second.returncode == 0, second.stdout
    assert "rewind" not in second.stdout.partition("resumed from step-000022")[2]
    assert losses(files / "run") == losses(files / "clean"), "to the bit"
    left_out = [record.get("left_out_batches") for record in metrics(files / "run")]
    assert left_out == [None] * 18 + [1] * 6
    assert status(files / "run", 2)["state"] == "finished"


def test_a_stop_at_a_spike_names_its_rows_and_is_not_restarted(tiny: Path, files: Path) -> None:
    bad = (*WORDS, "data.path=bad.jsonl", "run_dir=run", "training.on_spike=stop")
    ended = shardway(*bad, "cluster.max_restarts=3", cwd=files)
    assert ended.returncode == 2
    assert "step 21: loss " in ended.stdout
    assert "Rows of step 21: 80, 81, 82, 83 (shardway data preview … --row N)" in ended.stdout
    assert "not restarted: training.on_spike asks for the end" in ended.stdout
    assert not (files / "run/checkpoints/step-000024").exists()
