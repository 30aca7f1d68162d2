"""metrics.jsonl: one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from launcher.metrics import Record


class MetricsFile:
    """Appends every record. Training lines carry step, loss, learning_rate, grad_norm, tokens,
    tokens_per_second, time; evaluation lines step and eval_loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def start(self, total_steps: int) -> None:
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, records: list[Record]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def finish(self) -> None:
        assert self._file is not None
        self._file.close()
