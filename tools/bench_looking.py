"""How long it takes, and how much memory, to look at many runs and at long ones.

    python tools/bench_looking.py --runs 500 --lines 2000 --long 1000000

Makes run folders in a temporary folder and prints medians of time and peak memory of processes that
do what `shardway runs`, the page and `shardway report` do. Imports are included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from launcher.config import store
from launcher.config.compose import compose
from launcher.folders import manifest
from launcher.folders.run import RunDir

PAGE = """
import sys
from pathlib import Path
from launcher.ui.i18n import ENGLISH
from launcher.ui.jobs import Jobs
from launcher.ui.roots import Roots
from launcher.ui.viewer import Viewer
roots = Roots.of([Path(".")])
viewer = Viewer(roots, Jobs(roots))
for name in viewer.names()[: int(sys.argv[1])]:
    viewer.charts(viewer.view(name, ENGLISH))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500, help="short runs")
    parser.add_argument("--lines", type=int, default=2_000, help="of a short run")
    parser.add_argument("--long", type=int, default=1_000_000, help="lines of the long run")
    parser.add_argument("--times", type=int, default=3, help="of each measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(arguments.runs):
            make_run(folder / f"many/runs/{number:04d}", arguments.lines)
        for number in range(20):
            make_run(folder / f"twenty/runs/{number}", 100_000)
        make_run(folder / "long/runs/one", arguments.long)
        runs, report = ("-m", "launcher.cli", "runs"), ("-m", "launcher.cli", "report")
        cases = {
            f"shardway runs, {arguments.runs} runs of {arguments.lines:,} lines": ("many", *runs),
            f"shardway runs, a run of {arguments.long:,} lines": ("long", *runs),
            f"page, a run of {arguments.long:,} lines": ("long", "-c", PAGE, "1"),
            "page, 20 runs of 100,000 lines": ("twenty", "-c", PAGE, "20"),
            f"report, a run of {arguments.long:,} lines": ("long", *report, "runs/one"),
        }
        for title, (where, *words) in cases.items():
            measured = [measure(folder / where, words) for _ in range(arguments.times)]
            wall, cpu, megabytes = map(statistics.median, zip(*measured, strict=True))
            print(f"{title}: {wall:.1f} s, {cpu:.1f} s of CPU, {megabytes:.0f} MB", flush=True)


@cache
def frozen(steps: int) -> str:
    """The configuration of a run of so many steps."""
    return store.dump(
        compose(["model=tiny", "training.epochs=null", f"training.max_steps={steps}"])
    )


def make_run(path: Path, lines: int) -> None:
    """The folder of a finished run with an evaluation after every 500 steps."""
    run = RunDir(path)
    run.logs.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.config.write_text(frozen(lines))
    manifest.write_json(run.status, {"state": "finished", "exit_code": 0})
    manifest.write_json(run.steps, {"total_steps": lines})
    with run.metrics.open("w") as file:
        for step in range(1, lines + 1):
            record = {
                "step": step, "loss": 2.0 + step % 7 / 10, "learning_rate": 1e-4 / step,
                "grad_norm": 0.5, "tokens": 4096 * step, "tokens_per_second": 51234.5 + step % 9,
                "peak_memory_bytes": 2_500_000_000, "data_wait": 0.01, "time": 1.7e9 + step,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
            if step % 500 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 2.5 + step % 3}) + "\n")


def measure(folder: Path, words: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and peak memory (MB) of a Python process with these arguments."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{words} ended with {status}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


if __name__ == "__main__":
    main()
