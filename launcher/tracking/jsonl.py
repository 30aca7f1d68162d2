"""metrics.jsonl: one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from launcher.folders.manifest import write_json, write_text
from launcher.tracking.base import Record


class MetricsFile:
    """Appends every record. Lines of steps have step, loss, learning_rate, grad_norm, tokens,
    tokens_per_second, time and others; lines of evaluations have step and eval_loss."""

    def __init__(self, path: Path, lost: Path, steps: Path) -> None:
        """`lost` receives the lines of steps that are repeated, `steps` the number of all steps."""
        self.path = path
        self.lost = lost
        self.steps = steps
        self._file: IO[str] | None = None

    def start(self, done_steps: int, total_steps: int) -> None:
        """Continue after `done_steps`. Lines of later steps, whose work was lost, are moved to the
        file `lost`.

        This always creates a new file, so that an earlier attempt that was given up but is still
        alive does not write to it.
        """
        write_json(self.steps, {"total_steps": total_steps})
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        # The last line may be incomplete.
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        valid = [line for line in lines if json.loads(line)["step"] <= done_steps]
        if lost := [line for line in lines if json.loads(line)["step"] > done_steps]:
            with self.lost.open("a", encoding="utf-8") as file:
                file.writelines(lost)
        write_text(self.path, "".join(valid))
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, records: list[Record]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def finish(self) -> None:
        assert self._file is not None
        self._file.close()
