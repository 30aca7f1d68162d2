"""Rows per second and memory of tokenizing and packing a large data set.

    python tools/bench_data.py                      a million rows like those of alpaca, all cores
    python tools/bench_data.py --rows 50000 --workers 1
    python tools/bench_data.py --data my.json       your rows, repeated up to --rows

By default the rows are synthetic, with lengths like those of instruction data. The cache is a new,
empty folder, which is removed at the end. Memory is the resident memory of this process and its
workers (shared pages count once per process), sampled ten times per second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from launcher.commands.fetch import MODELS, fetch
from launcher.config.schema.data import DataConfig
from launcher.data import source
from launcher.data.build import TokenizationProgress, sequence_lengths
from launcher.data.dataset import load_data
from launcher.data.packing import pack
from launcher.io.cpus import usable_cpus
from launcher.model.tokenizer import load_tokenizer

WORDS = ("the", "of", "model", "data", "loss", "is", "a", "to", "train", "rank", "token", "batch")


def main() -> None:
    arguments = _parser().parse_args()
    tokenizer = load_tokenizer(fetch(arguments.model), trust_remote_code=False)
    with tempfile.TemporaryDirectory(prefix="shardway-bench-") as scratch:
        os.environ["SHARDWAY_CACHE"] = scratch
        path = Path(scratch) / "rows.jsonl"
        _write(path, arguments.rows, arguments.data)
        config = DataConfig(
            path=str(path), max_length=arguments.max_length, workers=arguments.workers
        )
        memory = Memory()
        began = time.perf_counter()
        data = load_data(config, tokenizer, TokenizationProgress(print, lambda: None))
        tokenized = time.perf_counter()
        numbers = np.arange(len(data.rows))
        sequences = pack(numbers, data.rows.lengths, config.max_length)
        packed = time.perf_counter()
        full = sequence_lengths(data.rows, sequences).sum() / (len(sequences) * config.max_length)
        peak = memory.stop()
        print(f"{data.describe()}\nof {path.stat().st_size / 1e6:,.0f} MB of JSON lines")
    seconds = tokenized - began
    print(
        f"tokenized in {seconds:,.0f} s: {arguments.rows / seconds:,.0f} rows/s on "
        f"{usable_cpus()} cores\n"
        f"packed in {packed - tokenized:.1f} s: {len(sequences):,} sequences, {full:.2%} full\n"
        f"peak memory: {peak['main'] / 1e9:.2f} GB, with workers {peak['all'] / 1e9:.2f} GB"
    )


@dataclass
class Memory:
    """The peak memory of this process, and of this process plus its workers."""

    peak: dict[str, int] = field(default_factory=lambda: {"main": 0, "all": 0})

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(0.1):
            main, workers = own.memory_info().rss, 0
            for child in own.children(recursive=True):
                try:
                    workers += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak["main"] = max(self.peak["main"], main)
            self.peak["all"] = max(self.peak["all"], main + workers)


def _write(path: Path, count: int, data: Path | None) -> None:
    rows = _made_up() if data is None else _given(data)
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(rows, count)):
            row["instruction"] = f"{number}. {row['instruction']}"  # every row is different
            file.write(json.dumps(row) + "\n")


def _made_up() -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    while True:
        asked, answered = (
            draw.choices(WORDS, k=max(3, int(draw.lognormvariate(m, 0.8)))) for m in (2.5, 4.5)
        )
        yield {"instruction": " ".join(asked), "output": " ".join(answered)}


def _given(data: Path) -> Iterator[dict[str, Any]]:
    rows = [row for _, row in source.iter_rows(DataConfig(path=str(data)), by_line=False)]
    return (dict(row) for row in cycle(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="its tokenizer")
    parser.add_argument("--data", type=Path, metavar="FILE", help="alpaca rows to repeat")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--workers", type=int)
    return parser


if __name__ == "__main__":
    main()
