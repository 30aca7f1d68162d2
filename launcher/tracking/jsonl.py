"""metrics.jsonl: one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from launcher.manifest import write_json, write_text
from launcher.metrics import Record


class MetricsFile:
    """Appends every record. Training lines carry step, loss, learning_rate, grad_norm, tokens,
    tokens_per_second, time; evaluation lines step and eval_loss."""

    def __init__(self, path: Path, lost: Path, steps: Path) -> None:
        self.path = path
        self.lost = lost
        self.steps = steps  # told how many there will be
        self._file: IO[str] | None = None

    def start(self, done_steps: int, total_steps: int) -> None:
        """Go on after `done_steps`: lines of later steps, whose work was lost, are set aside.

        The file is always a new one: what an attempt that was given up, and still lives, writes on
        is no longer this.
        """
        write_json(self.steps, {"total_steps": total_steps})
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        # The last line may be half there.
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= done_steps]
        if lost := [line for line in lines if json.loads(line)["step"] > done_steps]:
            with self.lost.open("a", encoding="utf-8") as file:
                file.writelines(lost)
        write_text(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, records: list[Record]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def finish(self) -> None:
        assert self._file is not None
        self._file.close()
