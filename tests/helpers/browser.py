"""A real browser on a real page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import SHARDWAY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def served(home: Path, *words: str) -> Iterator[Served]:
    """Run `shardway ui` in `home` until the block ends."""
    log = home / "ui.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*SHARDWAY, "ui", "--port", "0", *words],
            cwd=home,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"shardway ui: (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "the page did not come up"
            time.sleep(0.1)
        yield Served(found[1], process, log)
    finally:
        process.terminate()
        process.wait(30)
