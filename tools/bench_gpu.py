"""One GPU: tokens/s, MFU and peak memory of `shardway train`, with one setting changed per row.

    python tools/bench_gpu.py --peak-tflops 989        shape of Llama-3-8B, rows of 4,096 tokens
    python tools/bench_gpu.py --rows lora qlora        only these rows
    python tools/bench_gpu.py --rows lora --json       one line of JSON per row instead of the table
    python tools/bench_gpu.py --shape tiny             the same on a CPU, to check that it runs

The model (tools/random_model.py) and the text are random, which does not change the speed. The
first steps are not timed. On a GPU the peak is the memory allocated by the driver since the start;
on a CPU it is the resident set of the rank. The plan comes from `shardway plan`; its error is
relative to the peak that the rank measures itself (`peak_memory_bytes`), which on a CPU includes
the code of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import random_model
from bench_process import Family, peak_rss, watch

import launcher
from launcher.cluster.gpus import visible_gpus
from launcher.errors import UserError

Record = dict[str, Any]
GB = 1e9
CHECKOUT = Path(launcher.__file__).resolve().parent.parent
SEED = 42
LENGTHS = {"8b": 4096, "1b": 4096, "tiny": 64}  # tokens per row
BASE = {"method": "lora", "strategy": "single", "precision": "bf16", "scheduler": "constant"}
FULL = {"method": "full", "precision": "pure_bf16", "optimizer": "adamw_8bit"}


@dataclass(frozen=True)
class Row:
    """A row of the table: its changes relative to BASE, the first row."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    short: bool = False  # texts of uneven length instead of full rows


ROWS = (
    Row("lora"),
    Row("recompute-all", {"training.activation_checkpointing": "full"}),
    Row("recompute-half", {"training.activation_checkpointing": 2}),
    Row("whole-loss", {"training.loss": "whole"}),
    Row("liger-loss", {"training.loss": "liger"}),
    Row("liger-kernels", {"training.kernels": "liger"}),
    Row("liger", {"training.loss": "liger", "training.kernels": "liger"}),
    Row("compile", {"training.compile": "on"}),
    Row("log-every-10", {"training.log_steps": 10}),
    Row("short-padded", {}, short=True),
    Row("short-packed", {"data.packing": True}, short=True),
    Row("qlora", {"method": "qlora"}),
    Row("full", {**FULL, "training.activation_checkpointing": "full"}),
)


@dataclass
class Seen:
    records: list[Record] = field(default_factory=list)  # of metrics.jsonl
    peak: int = 0  # bytes


@dataclass
class Figures:
    """A row of the table; with `failed`, the reason why it has no figures."""

    row: str
    changes: str
    tokens_per_second: float | None = None
    mfu: float | None = None  # None without --peak-tflops, and for texts of uneven length
    peak: int | None = None  # bytes
    measured: int | None = None  # bytes: the peak that the rank measures itself
    plan: int | None = None  # bytes: the peak from `shardway plan`
    failed: str = ""
    plan_error: str = "--no-plan"  # why there is no plan

    def line(self) -> str:
        """The row as Markdown."""
        head = f"| {self.row} | {self.changes} |"
        if self.tokens_per_second is None or self.peak is None or self.measured is None:
            return f"{head} failed: {self.failed.replace('|', '/')} | | | |"
        mfu = "–" if self.mfu is None else f"{self.mfu:.1%}"
        plan = f"none: {self.plan_error}".replace("|", "/")
        if self.plan is not None:
            plan = f"{self.plan / GB:.2f} GB ({self.plan / self.measured - 1:+.0%})"
        return f"{head} {self.tokens_per_second:,.0f} | {mfu} | {self.peak / GB:.2f} GB | {plan} |"


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the training process, too
    arguments = parser().parse_args()
    try:
        bench(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def bench(arguments: argparse.Namespace) -> None:
    """Print the table, or with --json the figures, each row as soon as it is measured."""
    if arguments.shape != "tiny" and not visible_gpus():
        raise UserError(f"--shape {arguments.shape} needs a GPU, and none is seen → --shape tiny")
    length = LENGTHS[arguments.shape]
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-gpu-") as scratch:
        folder = Path(scratch)
        if arguments.model is None:
            arguments.model = folder / "model"
        if not arguments.model.exists():
            random_model.make(arguments.shape, arguments.model)
        texts(folder, arguments.steps * arguments.batch, length)
        if not arguments.json:
            print(f"{arguments.shape}, rows of {length} tokens, {arguments.batch} a step")
            print("| row | changes | tokens/s | MFU | peak | plan (error) |")
            print("|---|---|--:|--:|--:|--:|")
        for row in ROWS:
            if row.name in (arguments.rows or [row.name]):
                figures = measure(row, folder, length, arguments)
                line = json.dumps(asdict(figures)) if arguments.json else figures.line()
                print(line, flush=True)


def measure(row: Row, folder: Path, length: int, arguments: argparse.Namespace) -> Figures:
    """Run a row."""
    (run := folder / row.name).mkdir()
    figures = Figures(row.name, " ".join(said(row.changes)))
    seen = train(row, folder, run, length, arguments)
    timed = seen.records[arguments.warm_up - 1 :]
    if len(timed) < 2:
        figures.failed = last_words(run)
        return figures
    figures.tokens_per_second = rate(timed)
    figures.peak, figures.measured = seen.peak, seen.records[-1]["peak_memory_bytes"]
    if arguments.peak_tflops and not row.short:
        is_full = {**BASE, **row.changes}["method"] == "full"
        flops = figures.tokens_per_second * flops_per_token(arguments.shape, length, is_full)
        figures.mfu = flops / (arguments.peak_tflops * 1e12)
    if arguments.plan:
        figures.plan, figures.plan_error = planned(row, folder, length, arguments)
    return figures


def planned(
    row: Row, folder: Path, length: int, arguments: argparse.Namespace
) -> tuple[int | None, str]:
    """The peak in bytes from `shardway plan`, or None and the reason."""
    words = [sys.executable, "-m", "launcher.cli", "plan", "--json"]
    words += [*overrides(row, folder, length, arguments), "cluster.nproc_per_node=1"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        return None, done.stderr.strip().splitlines()[-1]
    return int(json.loads(done.stdout)["peak"]), ""


def train(row: Row, folder: Path, run: Path, length: int, arguments: argparse.Namespace) -> Seen:
    """Run `shardway train` until its last step is recorded."""
    seen, before, metrics = Seen(), gpu_bytes(), run / "run" / "metrics.jsonl"

    def enough(family: Family) -> bool:
        used = gpu_bytes()
        seen.peak = max(seen.peak, peak_rss(family) if used is None else used - (before or 0))
        seen.records = records(metrics)
        return len(seen.records) >= int(arguments.steps)

    words = [sys.executable, "-m", "launcher.cli", "train", f"run_dir={run / 'run'}"]
    words += overrides(row, folder, length, arguments)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "SHARDWAY_CACHE": str(run / "cache")}
    watch(words, environment, run, enough, arguments.seconds)
    seen.records = records(metrics)
    return seen


def records(metrics: Path) -> list[Record]:
    """The complete records: the last line may be partly written."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    return [json.loads(line) for line in lines]


def overrides(row: Row, folder: Path, length: int, arguments: argparse.Namespace) -> list[str]:
    """The Shardway overrides of a row."""
    settings = {
        **BASE,
        "model.name_or_path": arguments.model,
        "data": "alpaca" if row.short else "pretrain",
        "data.path": folder / ("short.json" if row.short else "full.txt"),
        "data.max_length": length,
        "training.micro_batch_size": arguments.micro_batch,
        "training.global_batch_size": arguments.batch,
        "training.epochs": "null",
        "training.max_steps": arguments.steps,
        **row.changes,
    }
    return said(settings)


def said(settings: dict[str, Any]) -> list[str]:
    """Format the settings as overrides."""
    words = {True: "true", False: "false"}
    return [f"{k}={words[v] if isinstance(v, bool) else v}" for k, v in settings.items()]


def texts(folder: Path, rows: int, length: int) -> None:
    """Write full.txt with `rows` rows of `length` bytes, one token per byte, and short.json with
    answers of a tenth to a half of that length."""
    draw = random.Random(SEED)

    def letters(count: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=count))

    (folder / "full.txt").write_text(letters(rows * length))
    answers = [letters(draw.randint(length // 10, length // 2)) for _ in range(rows)]
    short = [{"instruction": "abc", "input": "", "output": answer} for answer in answers]
    (folder / "short.json").write_text(json.dumps(short))


def rate(timed: list[Record]) -> float:
    """Tokens per second from the end of the first record to the end of the last one. Records that
    are written together every log_steps share one time; of the first such group the last counts."""
    began = [record for record in timed if record["time"] == timed[0]["time"]][-1]
    tokens, seconds = (timed[-1][key] - began[key] for key in ("tokens", "time"))
    return float(tokens / seconds)


def flops_per_token(shape: str, length: int, full: bool) -> float:
    """FLOPs of forward and backward without recomputation: 6N + 3a if all weights are trained,
    4N + 3a for adapters, whose own FLOPs are ignored. N: parameters in matrix products, including
    the head; a: FLOPs of causal attention in the forward pass."""
    config = random_model.config_of(shape)
    hidden, heads = config.hidden_size, config.num_attention_heads
    grouped = hidden * config.num_key_value_heads // heads
    layer = 2 * hidden * (hidden + grouped) + 3 * hidden * config.intermediate_size
    parameters = config.num_hidden_layers * layer + hidden * config.vocab_size
    attention = 2 * config.num_hidden_layers * hidden * length
    return float((6 if full else 4) * parameters + 3 * attention)


def gpu_bytes() -> int | None:
    """Bytes in use on the first GPU according to the driver; None without a GPU."""
    if not visible_gpus():
        return None
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def last_words(run: Path) -> str:
    """The last line of the log of a run."""
    lines = (run / "log.txt").read_text(errors="replace").strip().splitlines()
    return (lines or ["it said nothing"])[-1][-160:]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    made.add_argument("--shape", choices=list(LENGTHS), default="8b")
    made.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--warm-up", type=int, default=10, help="steps that are not timed")
    made.add_argument("--batch", type=int, default=4, help="rows a step")
    made.add_argument("--micro-batch", type=int, default=1, help="rows a forward")
    made.add_argument("--seconds", type=float, default=600.0, help="of a row, at most")
    made.add_argument("--peak-tflops", type=float, help="of the GPU, dense bf16: 989 on an H100")
    made.add_argument("--scratch", type=Path, help="a folder with room for the model")
    made.add_argument(
        "--model", type=Path, help="a model of that shape, made there if it does not exist and kept"
    )
    made.add_argument("--no-plan", dest="plan", action="store_false", help="do not plan the rows")
    made.add_argument("--json", action="store_true", help="print one line of JSON per row")
    return made


if __name__ == "__main__":
    main()
