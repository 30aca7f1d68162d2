"""`shardway data preview`: inspect the training data of a run before starting it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.commands.arguments import command_parser, picture_path
from launcher.config import Config, store
from launcher.config.compose import compose_command_line
from launcher.config.rules.data import DATA_RULES
from launcher.config.rules.model import MODEL_RULES
from launcher.config.rules.rule import World
from launcher.config.rules.table import broken_rules
from launcher.data import source
from launcher.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from launcher.data.build import Loaders
    from launcher.data.dataset import Row
    from launcher.data.loader import Loader

ABOUT = """\
Show the data that `shardway train` would train on, with the same overrides: rows with the tokens in
the loss in color, the lengths of rows (in the terminal and as a picture), the cost of padding, the
benefit of packing, and how many rows are cut, left out or bad.

    shardway data preview data=alpaca data.path=my.json
    shardway data preview data.path=my.jsonl data.max_length=1024 --rows 5
    shardway data preview data.path=my.jsonl --row 117 --no-picture

The settings are described in docs/data.md.
"""
BAR_WIDTH, BINS = 60, 12
GREEN, RESET = "\033[32m", "\033[0m"
# Characters that move the cursor, change colors or reverse the text: data must not control the
# terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MAX_PADDING_STEPS = 200  # steps whose padding is measured; more steps do not change the result


def main() -> None:
    """The command line."""
    options, overrides = _parser().parse_known_args()
    sys.argv = [sys.argv[0], *overrides]
    (config,) = compose_command_line()
    preview(config, options)


def preview(config: Config, options: argparse.Namespace) -> None:
    """Print the preview. Raises UserError if a run cannot train on the data."""
    problems = broken_rules(config, World(1, 1), (*MODEL_RULES, *DATA_RULES))
    if problems := problems + source.find_problems(config.data):
        raise store.ConfigError(problems)
    if options.rows < 0:
        raise UserError(f"--rows {options.rows} is negative → --rows 3")
    picture = (
        None
        if options.no_picture or options.json
        else picture_path(options.output, "lengths.png", options.overwrite)
    )
    log = partial(print, file=sys.stderr) if options.json else print
    loaders, tokenizer = _load(config, log)
    rows = loaders.training.rows
    chosen = [options.row] if options.row is not None else range(min(options.rows, len(rows)))
    for number in chosen:
        if not 0 <= number < len(rows):
            raise UserError(f"--row {number}: there are {len(rows)} rows, numbered from 0")
    if options.json:
        print(
            json.dumps(
                preview_json(config, loaders.training, tokenizer, chosen), ensure_ascii=False
            )
        )
        return
    for number in chosen:
        print(f"\nrow {number}: {rows.length(number)} tokens")
        print(colored(tokenizer, rows[number], sys.stdout.isatty()))
    if config.data.streaming:
        print("\ndata.streaming=true: row lengths are unknown until rows are read")
        return
    lengths = stored_lengths(loaders.training)
    print(f"\n{histogram(lengths)}\n")
    print("\n".join(efficiency(config, loaders.training)))
    if picture:
        draw(lengths, config.data.max_length, picture)
        print(f"\npicture: {picture}")


def preview_json(
    config: Config, loader: Loader, tokenizer: PreTrainedTokenizerBase, chosen: Sequence[int]
) -> dict[str, Any]:
    """The preview as one object: rows as [text, whether it is in the loss], lengths as lines."""
    rows = loader.rows
    lines = [] if config.data.streaming else [*efficiency(config, loader)]
    return {
        "rows": [
            {"row": n, "tokens": rows.length(n), "parts": parts(tokenizer, rows[n])} for n in chosen
        ],
        "lengths": None if config.data.streaming else histogram(stored_lengths(loader)),
        "efficiency": lines,
    }


def stored_lengths(loader: Loader) -> NDArray[np.int32]:
    """Tokens per row, [rows] int32. The rows must be stored, not streamed."""
    from launcher.data.dataset import TokenizedRows

    assert isinstance(loader.rows, TokenizedRows)
    return loader.rows.lengths


def colored(tokenizer: PreTrainedTokenizerBase, row: Row, colors: bool) -> str:
    """A row's text, with the tokens in the loss in green, or between ⟦ and ⟧ without colors."""
    start, end = (GREEN, RESET) if colors else ("⟦", "⟧")
    pieces = parts(tokenizer, row)
    return "".join(f"{start}{text}{end}" if in_loss else text for text, in_loss in pieces)


def parts(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[tuple[str, bool]]:
    """A row's text in pieces, each with whether it is in the loss."""
    ids, loss_mask = row
    runs = groupby(zip(ids.tolist(), loss_mask.tolist(), strict=True), lambda pair: pair[1])
    return [
        (CONTROL.sub(_escape, str(tokenizer.decode([token for token, _ in run]))), bool(in_loss))
        for in_loss, run in runs
    ]


def _escape(character: re.Match[str]) -> str:
    """A control character as a printable escape sequence."""
    return character[0].encode("unicode_escape").decode()


def histogram(lengths: NDArray[np.int32]) -> str:
    """The distribution of row lengths, as lines of blocks."""
    counts, edges = np.histogram(lengths, bins=BINS)
    labels = [f"{int(a):>6}–{int(b):<6}" for a, b in pairwise(edges)]
    bars = [("█" * round(BAR_WIDTH * count / counts.max()), count) for count in counts.tolist()]
    median, percentile = np.percentile(lengths, (50, 95))
    head = (
        f"tokens per row: median {median:.0f}, 95th percentile {percentile:.0f}, "
        f"longest {lengths.max()}"
    )
    lines = (f"{label} {bar} {n:,}" for label, (bar, n) in zip(labels, bars, strict=True))
    return "\n".join([head, *lines])


def efficiency(config: Config, loader: Loader) -> Iterator[str]:
    """The share of computed positions that are tokens, as configured and with other settings."""
    from launcher.data.build import rebuild_loader

    variants = {
        "no packing or grouping": replace(config.data, packing=False, group_by_length=False),
        "data.group_by_length=true": replace(config.data, packing=False, group_by_length=True),
        "data.packing=true": replace(config.data, packing=True, group_by_length=False),
    }
    training = config.training
    yield (
        "computed positions that are tokens, not padding, with training.micro_batch_size="
        f"{training.micro_batch_size} and training.global_batch_size={training.global_batch_size}:"
    )
    for label, data in variants.items():
        arranged = rebuild_loader(loader, data, training.seed)
        steps = range(min(arranged.steps_per_epoch, MAX_PADDING_STEPS))
        tokens, positions = np.sum([arranged.count_positions(step) for step in steps], axis=0)
        mark = "  ← as configured" if data == config.data else ""
        yield (
            f"  {label:<26} {tokens / positions:6.1%}   {arranged.steps_per_epoch:,} steps per "
            f"epoch{mark}"
        )


def draw(lengths: NDArray[np.int32], max_length: int, picture: Path) -> None:
    """Draw the histogram, with a line at the length where rows are cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=60)
    axes.axvline(max_length, color="tab:red", label=f"data.max_length={max_length}")
    axes.set(xlabel="tokens per row", ylabel="rows", title="Row lengths")
    axes.legend()
    figure.savefig(picture, dpi=120)


def _load(config: Config, log: Callable[[str], None]) -> tuple[Loaders, PreTrainedTokenizerBase]:
    from launcher.data.build import build_loaders
    from launcher.folders.vocabulary import embedding_rows
    from launcher.model.open import open_model

    folder, tokenizer = open_model(config, log)

    def never_stop() -> None:
        """Only Ctrl-C ends a preview."""

    rows = embedding_rows(folder)
    loaders = build_loaders(config.data, config.training, tokenizer, 0, 1, log, never_stop, rows)
    return loaders, tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("data", ABOUT, "%(prog)s preview [options] [OVERRIDE ...]")
    parser.add_argument("preview", choices=["preview"], help="the only subcommand of data")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--row", type=int, metavar="I", help="show only this row, counted from 0")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="picture, .png or .svg (default lengths.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--no-picture", action="store_true", help="only print")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no picture")
    return parser
