"""How long the page takes to answer while a run uses every core.

    python tools/bench_ui.py                     with Chromium and playwright installed
    python tools/bench_ui.py --model tiny --rounds 30

Starts `shardway ui` in a new folder. Each round changes a setting and waits until the command shows
it, opens another tab, and reloads the page. Prints the median, the 95th percentile and the maximum
of each action in seconds: first without a run, then during one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import UserError

SHARDWAY = (sys.executable, "-P", "-m", "launcher.cli")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("smollm2_135m", "tiny"), default="smollm2_135m")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    try:
        measure(asked.model, asked.rounds)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def measure(model: str, rounds: int) -> None:
    """Print a table. Raises UserError if Chromium is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise UserError("no chromium on PATH → apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="bench-ui-") as folder, sync_playwright() as running:
        server, url = serve(Path(folder))
        run: subprocess.Popen[bytes] | None = None
        browser = running.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            print(f"{'':28} {'median':>8} {'95 %':>8} {'largest':>8}")
            for beside in ("no run", f"beside a run of {model}"):
                if beside != "no run":
                    run = train(Path(folder), model)
                for what, seconds in timed(browser, url, rounds).items():
                    seconds.sort()
                    figures = (
                        *(statistics.median(seconds), seconds[int(0.95 * (len(seconds) - 1))]),
                        seconds[-1],
                    )
                    print(f"{what:28} " + " ".join(f"{each:8.3f}" for each in figures), beside)
        finally:
            browser.close()
            server.terminate()
            if run is not None:
                (Path(folder) / "runs/bench/stop").write_text("bench")
                run.wait(120)


def timed(browser: Any, url: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of each user action, measured in `rounds` alternating rounds."""
    page = opened(browser, url)
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        taken.setdefault("a setting is typed", []).append(clocked(partial(typed, page, number)))
        for name in ("Runs", "Train"):
            taken.setdefault("another tab", []).append(clocked(partial(switched, page, name)))
        taken.setdefault("the page is opened", []).append(
            clocked(lambda: opened(browser, url).context.close())
        )
    page.context.close()
    return taken


def clocked(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def opened(browser: Any, url: str) -> Any:
    page = browser.new_context().new_page()
    page.goto(url)
    page.locator("#summary p").wait_for()
    return page


def typed(page: Any, number: int) -> None:
    """Type a seed and wait until the command shows it."""
    page.locator("#training-seed textarea, #training-seed input").first.fill(str(1000 + number))
    page.wait_for_function(
        "seed => document.querySelector('#command textarea').value.includes(seed)",
        arg=f"training.seed={1000 + number}",
    )


def switched(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.locator("#run" if name == "Runs" else "#start").wait_for()


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with (folder / "ui.log").open("wb") as log:
        server = subprocess.Popen(
            [*SHARDWAY, "ui", "--port", "0", "--root", str(folder)], cwd=folder, stdout=log
        )
    while not (found := re.search(r"shardway ui: (\S+)", (folder / "ui.log").read_text())):
        time.sleep(0.2)
        if server.poll() is not None:
            raise UserError(f"shardway ui ended with {server.returncode}")
    return server, found[1]


def train(folder: Path, model: str) -> subprocess.Popen[bytes]:
    """Start a run, and return once it makes steps on every core."""
    words = ["train", "experiment=demo", f"model={model}", "training.max_steps=100000"]
    run = subprocess.Popen(
        [*SHARDWAY, *words, "run_dir=runs/bench"], cwd=folder, stdout=subprocess.DEVNULL
    )
    while not (folder / "runs/bench/metrics.jsonl").is_file():
        time.sleep(0.5)
        if run.poll() is not None:
            raise UserError(f"shardway train ended with {run.returncode}; shardway fetch {model}?")
    return run


if __name__ == "__main__":
    main()
