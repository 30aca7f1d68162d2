"""The job of an arm: a JSON file that the benchmark passes to the process of the arm."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, SEED = 8, 16, 1e-4, 42  # used by every arm


@dataclasses.dataclass(frozen=True)
class Job:
    model: str  # folder
    rows: str  # alpaca rows, JSON
    folder: str  # scratch folder of this run; the counts are written here
    ranks: int
    steps: int
    micro_batch_size: int  # rows, or packs, per rank and forward
    accumulation: int  # micro-batches per rank and step
    max_length: int
    settings: dict[str, Any]  # changes to the defaults of the system

    def write(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    def counts(self, rank: int) -> Path:
        """One JSON object per step: step, tokens, trained_tokens; for peers also loss and time."""
        return Path(self.folder) / f"rank-{rank}.jsonl"

    def texts(self) -> list[dict[str, str]]:
        """The rows as pairs of question and answer."""
        rows = json.loads(Path(self.rows).read_text(encoding="utf-8"))
        return [{"question": _question(row), "answer": row["output"]} for row in rows]


def _question(row: dict[str, str]) -> str:
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


def read() -> Job:
    """Read the job of this process from the file named in its first argument."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))
