"""Every causal model type of transformers, tiny, from training to `from_pretrained`.

    python tools/bench_models.py RESULTS.jsonl                      two minutes a dozen, on 2 cores
    python tools/bench_models.py RESULTS.jsonl --only qwen3 gemma2
    python tools/bench_models.py RESULTS.jsonl --write docs/models.md

One line of JSON for each type is appended to RESULTS; types that have a line are skipped, so that
an interrupted run continues. `--only` tries its types again. `--write` makes the page of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from tests.helpers import tiny_models
from tests.helpers.model_table import Row, in_page, row_of
from tests.helpers.pool import RankPool

# Above it a page is written by hand, below it by this tool.
MARK = "<!-- written by tools/bench_models.py -->\n"


def main() -> None:
    arguments = _parser().parse_args()
    done = read_rows(arguments.results)
    wanted = arguments.only or [t for t in tiny_models.model_types() if t not in done]
    if wanted and not arguments.no_run:
        run(wanted, arguments.results)
    if arguments.write:
        above = arguments.write.read_text()
        arguments.write.write_text(page(above, read_rows(arguments.results)))


def run(wanted: list[str], results: Path) -> None:
    """Append a line for each of `wanted` to `results`."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shardway-models-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text("".join(map(_conversation, range(9))))
        ranks = RankPool(2)
        for model_type in wanted:
            began = time.monotonic()
            try:
                with redirect_stdout(StringIO()):
                    row = row_of(model_type, ranks, rows, Path(scratch) / "work")
            except AssertionError as error:  # a rank died or hung
                last = str(error).strip().splitlines()[-1]
                row = Row(model_type, lora=f"lost: {last}", full=f"lost: {last}")
            seconds = time.monotonic() - began
            with results.open("a") as file:
                file.write(json.dumps({**asdict(row), "seconds": round(seconds, 1)}) + "\n")
            print(f"{model_type:28} {seconds:5.1f} s  {_brief(row)}", flush=True)
        ranks.close()


def read_rows(results: Path) -> dict[str, Row]:
    """The last line of each type."""
    found = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            values = json.loads(line)
            del values["seconds"]
            found[values["model_type"]] = Row(**values)
    return found


def page(above: str, rows: dict[str, Row]) -> str:
    """A page of the documentation: `above` up to the mark, then the counts and the rows."""
    whole = sum(row.is_whole for row in rows.values())
    lost = sum(row.is_lost for row in rows.values())
    unbuilt = sum(row.lora.startswith("unbuilt") for row in rows.values())
    refused = len(rows) - whole - lost - unbuilt
    lines = [
        f"Of {len(rows)} model types of transformers {transformers.__version__}, {whole} are",
        f"whole, {refused} refused under one method or both, {lost} lost, and {unbuilt} unbuilt.",
        "",
        "| model type | class of the folder | lora | full | packing | attention | reason |",
        "|---|---|---|---|---|---|---|",
        *(in_page(rows[name]) for name in sorted(rows)),
    ]
    return above.partition(MARK)[0] + MARK + "\n" + "\n".join(lines) + "\n"


def _brief(row: Row) -> str:
    return " | ".join(f"{name}: {getattr(row, name)[:150]}" for name in ("lora", "full", "packing"))


def _conversation(number: int) -> str:
    messages = [
        {"role": "user", "content": "ask " * (1 + number % 3)},
        {"role": "assistant", "content": f"answer {number} " * (1 + number % 2)},
    ]
    return json.dumps({"messages": messages}) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--only", nargs="+", metavar="TYPE", default=[])
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    return parser


if __name__ == "__main__":
    main()
