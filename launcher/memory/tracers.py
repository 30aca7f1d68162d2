"""Processes that trace. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.config import Config, store
from launcher.config.rules.rule import World
from launcher.config.schema.strategy import ZeroConfig
from launcher.errors import UserError
from launcher.memory.estimate import Trace

# Fake tensors are on the CPU, even if the machine has a GPU.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A trace of `config` with few layers, but at least `min_layers`, or with a few `more`; and if
    it is not 0, also with `wider_rows` in a micro-batch."""

    config: Config
    more: int
    min_layers: int
    wider_rows: int = 0


class Tracers:
    """Answers requests with two processes, which live as long as the context. One of them traces
    with DeepSpeed, which changes torch for what is traced after it."""

    def __init__(self, world: World) -> None:
        self._arguments = [str(world.nodes), str(world.nproc_per_node)]
        self._processes: dict[bool, subprocess.Popen[str]] = {}  # for DeepSpeed: yes, no
        self._scratch = tempfile.TemporaryDirectory(prefix="shardway-")
        self._files = 0

    def __enter__(self) -> Tracers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._scratch.cleanup()

    def answer(self, requests: Sequence[Request]) -> list[Trace | UserError]:
        """A trace for each request, or why there is none."""
        answers: dict[int, Trace | UserError] = {}
        messages = [self._message(each) for each in requests]
        uses_deepspeed = [isinstance(each.config.strategy, ZeroConfig) for each in requests]

        def work(deepspeed: bool) -> None:
            for at, message in enumerate(messages):
                if uses_deepspeed[at] == deepspeed:
                    answers[at] = self._ask(deepspeed, message)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, sorted(set(uses_deepspeed))))
        return [answers[at] for at in range(len(requests))]

    def _process(self, deepspeed: bool) -> subprocess.Popen[str]:
        if deepspeed not in self._processes:
            self._processes[deepspeed] = subprocess.Popen(
                [sys.executable, "-m", "launcher.memory.trace", *self._arguments],
                env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log_file(deepspeed).open("w"),
                text=True,
            )
        return self._processes[deepspeed]

    def _log_file(self, deepspeed: bool) -> Path:
        return Path(self._scratch.name) / f"{'deepspeed' if deepspeed else 'torch'}.log"

    def _message(self, request: Request) -> str:
        file = Path(self._scratch.name) / f"{self._files}.yaml"
        self._files += 1
        file.write_text(store.dump(request.config), encoding="utf-8")
        content = {"config": str(file), "more_layers": request.more}
        numbers = {"min_layers": request.min_layers, "wider_rows": request.wider_rows}
        return json.dumps(content | numbers)

    def _ask(self, deepspeed: bool, message: str) -> Trace | UserError:
        process = self._process(deepspeed)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(message, file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            log = self._log_file(deepspeed).read_text(errors="replace")
            return UserError(f"{log}\ntracing failed because of the error above")
        answer: dict[str, Any] = json.loads(line)
        return UserError(answer["refused"]) if "refused" in answer else Trace(**answer)
