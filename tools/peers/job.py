"""What an arm is asked to do: a JSON file between the benchmark and the arm's process."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, SEED = 8, 16, 1e-4, 42  # of every arm


@dataclasses.dataclass(frozen=True)
class Job:
    model: str  # folder
    rows: str  # alpaca rows, JSON
    folder: str  # scratch of this run; the counts are left here
    ranks: int
    steps: int
    micro_batch_size: int  # rows, or packs, per rank and forward
    accumulation: int  # micro-batches per rank and step
    max_length: int
    settings: dict[str, Any]  # what this arm changes of its system's defaults

    def write(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    def counts(self, rank: int) -> Path:
        """One JSON object a step: step, tokens, trained_tokens; of peers also loss and time."""
        return Path(self.folder) / f"rank-{rank}.jsonl"

    def texts(self) -> list[dict[str, str]]:
        """The rows as question and answer."""
        rows = json.loads(Path(self.rows).read_text(encoding="utf-8"))
        return [{"question": _question(row), "answer": row["output"]} for row in rows]


def _question(row: dict[str, str]) -> str:
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


def read() -> Job:
    """The job that this process was started for: its first argument."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))
