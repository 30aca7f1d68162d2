"""Training steps on a CUDA device that does not exist, as one of ranks that do not exist.

A process loads a device guard that does nothing (guard.cpp) before it imports torch, and runs
Shardway's own assembly and training step on fake tensors of device cuda over a fake process group.
Nothing is computed. What shows are tensors on the wrong device, the places where the host waits for
the device, and the messages to other ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.fake_cuda import build


@dataclass(frozen=True)
class Case:
    """A configuration, and the ranks to be one of. `model` is a folder with a config.json."""

    model: str
    overrides: tuple[str, ...]
    ranks: int = 8
    ranks_per_node: int = 8
    rank: int = 0
    trains: bool = True  # False: only builds the training state


@dataclass(frozen=True)
class Seen:
    """What a case did in its second step, or `error`."""

    error: str = ""
    ranks: int = 1
    # [phase, kind, dtype, elements of the complete tensor, ranks of the group, device], in order
    messages: list[tuple[str, str, str, int, int, str]] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)  # phase: reason @ functions → how often
    devices: dict[str, list[str]] = field(default_factory=dict)  # of parameters, buffers, moments
    held_bytes: int = 0  # parameters on this rank
    full_bytes: int = 0  # of the model
    # Part of the model → elements: (floating, quantized, trained), and its parameters.
    parts: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)


def run(cases: Sequence[Case], processes: int = 2) -> Iterator[Seen]:
    """What each case did, in their order, as soon as it is known; `processes` at the same time. The
    guard is compiled at the first call."""
    guard = build.library()
    with tempfile.TemporaryDirectory(prefix="shardway-fake-cuda-") as scratch:
        file, errors = Path(scratch) / "cases.json", Path(scratch) / "errors"
        file.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        command = [sys.executable, "-m", "tests.helpers.fake_cuda", guard, file, str(processes)]
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command,
                env={**os.environ, "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[3],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            ) as process,
        ):
            assert process.stdout
            try:
                # DeepSpeed prints, too.
                yield from (Seen(**json.loads(line)) for line in process.stdout if _is_result(line))
                process.wait()
            finally:
                process.terminate()
        assert process.returncode == 0, errors.read_text()


def _is_result(line: str) -> bool:
    return line.startswith('{"error": ')
