"""Run folders and checkpoints of released Shardway versions still resume and consolidate."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.folders.checkpoint import newest_checkpoint
from tests.helpers.commands import shardway
from tests.helpers.released import RELEASED, moved

pytestmark = pytest.mark.slow
EXPECTED: dict[str, Any] = json.loads((RELEASED / "expected.json").read_text())
WEIGHTS_ARE_COPIED = ("full-fsdp-fp32", "freeze-zero2-fp32")  # the others are merged here


IN_MAKE_TEST = ("full-fsdp-fp32", "lora-zero3-bf16")  # others: make test-all
NAMES = [
    pytest.param(name, marks=() if name in IN_MAKE_TEST else pytest.mark.whole) for name in EXPECTED
]


@pytest.mark.parametrize("name", NAMES)
def test_a_released_run_consolidates_and_resumes(name: str, tiny: Path, tmp_path: Path) -> None:
    run, expected = moved(name, tmp_path, tiny), EXPECTED[name]
    done = shardway("consolidate", run, "--output", tmp_path / "step-5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256((tmp_path / "step-5/model.safetensors").read_bytes()).hexdigest()
    if name in WEIGHTS_ARE_COPIED:
        assert digest == expected["export_sha256"]
    done = shardway("resume", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed from step-000005" in done.stdout
    assert newest_checkpoint(run / "checkpoints").step == 10
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records] == list(range(1, 11))
    for key in ("loss", "grad_norm"):
        found = [each[key] for each in records]
        assert found == pytest.approx(
            expected["losses" if key == "loss" else "grad_norms"], rel=1e-4
        )
