"""metrics.jsonl: one JSON object per line."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from io import TextIOBase
from pathlib import Path
from typing import IO

from launcher.folders import durable
from launcher.folders.manifest import write_json
from launcher.run.metrics import parse_record
from launcher.tracking.base import Record


class MetricsFile:
    """Appends every record. Lines of steps have step, loss, learning_rate, grad_norm, tokens,
    tokens_per_second, time and others; lines of evaluations have step and eval_loss."""

    def __init__(self, path: Path, lost: Path, steps: Path, console: TextIOBase) -> None:
        """`lost` receives the lines of steps that are repeated, `steps` the number of all steps."""
        self.path, self.lost, self.steps, self.console = path, lost, steps, console
        self._file: IO[str] | None = None

    def start(self, done_steps: int, total_steps: int) -> None:
        """Continue after `done_steps`. Lines of later steps, whose work was lost, and lines that
        are not records are moved to the file `lost`.

        This always creates a new file, so that an earlier attempt that was given up but is still
        alive does not write to it.
        """
        write_json(self.steps, {"total_steps": total_steps})
        bad = self._keep(done_steps) if self.path.is_file() else 0
        if bad:
            print(
                f"{self.path.name}: {bad:,} lines are not records; moved to {self.lost}",
                file=self.console,
                flush=True,
            )
        self._file = self.path.open("a", encoding="utf-8")

    def _keep(self, done_steps: int) -> int:
        """Rewrite the file with the records up to `done_steps`. Returns the number of bad lines."""
        bad = 0
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with self.path.open("rb") as old, temporary.open("wb") as kept, ExitStack() as stack:
            lost: IO[bytes] | None = None
            for line in old:
                record = parse_record(line)
                if record is not None and record["step"] <= done_steps:
                    kept.write(line.rstrip(b"\n") + b"\n")
                    continue
                lost = lost or stack.enter_context(self.lost.open("ab"))
                lost.write(line.rstrip(b"\n") + b"\n")
                # The last line may be incomplete: the attempt was killed while it was written.
                bad += record is None and line.endswith(b"\n")
        durable.replace(temporary, self.path)
        return bad

    def log(self, records: list[Record]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def finish(self) -> None:
        assert self._file is not None
        self._file.close()
