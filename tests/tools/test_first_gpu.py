"""tools/first_gpu.sh: every part leaves a line, whatever happens to it, and runs once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema.strategy import STRATEGIES

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPT = TOOLS / "first_gpu.sh"
STUB = """#!/bin/bash
shift  # tools/first_gpu.py
[[ $* == *"smoke zero2 "* ]] && exit 1
[[ $* == *"plan "* ]] && exit 124
echo noise
echo "{\\"ran\\": \\"$1 $2\\"}"
"""


def script(folder: Path, *words: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the script; return its exit status and the lines of its output file."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *words, "found.jsonl"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    lines = (folder / "found.jsonl").read_text().splitlines()
    print(done.stdout, done.stderr)
    return done.returncode, [json.loads(line) for line in lines]


def test_every_part_leaves_one_line(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    status, lines = script(tmp_path, PYTHON=str(stub))
    found = {line["part"]: line for line in lines}
    assert status == 1
    assert len(found) == len(lines)
    assert found["experts zero3"]["found"] == {"ran": "experts zero3"}
    assert found["smoke zero2"]["status"].startswith("failed, see ")
    assert found["smoke zero2"]["found"] is None
    assert found["plan"]["status"] == "more than 240 seconds"
    kept = [line for line in lines if line["status"] == "ok"]
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    _, again = script(tmp_path, PYTHON=str(stub))
    assert again[: len(kept)] == kept
    assert [line["part"] for line in again[len(kept) :]] == ["smoke zero2", "plan"]


def test_its_strategies_and_rows_are_those_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_gpu

    text = SCRIPT.read_text()
    strategies = re.search(r"for strategy in (.*); do", text)
    rows = re.search(r"rows=\((.*)\)", text)
    assert strategies
    assert rows
    assert set(strategies[1].split()) == STRATEGIES.keys()
    assert set(rows[1].split()) <= {row.name for row in bench_gpu.ROWS}


@pytest.mark.slow
def test_a_part_prints_what_it_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(TOOLS / "first_gpu.py"), "experts", "zero3"),
            *("--shape", "tiny", "--scratch", str(tmp_path)),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TOOLS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    status, lines = script(tmp_path, "--cpu", PYTHON=sys.executable, PYTHONPATH=str(TOOLS.parent))
    assert status == 0
    assert all(line["found"] for line in lines)
