"""`shardway data preview`: look at what a run would learn, before it is started."""

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
from typing import Any

import numpy as np

from launcher import train
from launcher.config import Config, checks, store
from launcher.config.data_rules import DATA_RULES
from launcher.config.model_rules import MODEL_RULES
from launcher.config.rule import World
from launcher.data import source
from launcher.errors import UserError
from launcher.paths import picture_at

ABOUT = """\
Show what `shardway train` would learn from, with the same overrides: rows with the tokens that are
learnt in colour, how long rows are (in the terminal and as a picture), what padding costs and what
packing would save, and how many rows are cut, left out or bad.

    shardway data preview data=alpaca data.path=my.json
    shardway data preview data.path=my.jsonl data.max_length=1024 --rows 5
    shardway data preview data.path=my.jsonl --row 117 --no-picture

What the settings do: docs/data.md
"""
WIDTH, BARS = 60, 12
GREEN, PLAIN = "\033[32m", "\033[0m"
# What moves the cursor, changes colours or turns the order of signs: data must not.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
STEPS_LOOKED_AT = 200  # of padding: more change nothing


def main() -> None:
    """The command line. Exits with 2 where the data cannot be learnt from."""
    options, overrides = _parser().parse_known_args()
    sys.argv = [sys.argv[0], *overrides]
    try:
        (config,) = train.compose()
        preview(config, options)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)


def preview(config: Config, options: argparse.Namespace) -> None:
    """Print it. Raises UserError for what cannot be learnt from."""
    problems = checks.broken_rules(config, World(1, 1, 0), (*MODEL_RULES, *DATA_RULES))
    if problems := problems + source.problems(config.data):
        raise store.ConfigError(problems)
    if options.rows < 0:
        raise UserError(f"--rows {options.rows} is no number of rows → --rows 3")
    picture = (
        None
        if options.no_picture or options.json
        else picture_at(options.output, "lengths.png", options.overwrite)
    )
    say = partial(print, file=sys.stderr) if options.json else print
    loaders, tokenizer = _load(config, say)
    rows = loaders.training.rows
    chosen = [options.row] if options.row is not None else range(min(options.rows, len(rows)))
    for number in chosen:
        if not 0 <= number < len(rows):
            raise UserError(f"--row {number}: there are {len(rows)} rows, from 0")
    if options.json:
        print(json.dumps(told(config, loaders.training, tokenizer, chosen), ensure_ascii=False))
        return
    for number in chosen:
        print(f"\nrow {number}: {rows.length(number)} tokens")
        print(coloured(tokenizer, rows[number], sys.stdout.isatty()))
    if config.data.streaming:
        print("\ndata.streaming=true: lengths are known when rows come")
        return
    print(f"\n{histogram(rows.lengths)}\n")
    print("\n".join(efficiency(config, loaders.training)))
    if picture:
        draw(rows.lengths, config.data.max_length, picture)
        print(f"\npicture: {picture}")


def told(config: Config, loader: Any, tokenizer: Any, chosen: Sequence[int]) -> dict[str, Any]:
    """The same as one object: rows as [text, whether it is learnt], and the lines on lengths."""
    rows = loader.rows
    lines = [] if config.data.streaming else [*efficiency(config, loader)]
    return {
        "rows": [
            {"row": n, "tokens": rows.length(n), "parts": parts(tokenizer, rows[n])} for n in chosen
        ],
        "lengths": None if config.data.streaming else histogram(rows.lengths),
        "efficiency": lines,
    }


def coloured(tokenizer: Any, row: Any, colours: bool) -> str:
    """A row's text, what is learnt in green, or between ⟦ and ⟧ where there are no colours."""
    before, behind = (GREEN, PLAIN) if colours else ("⟦", "⟧")
    pieces = parts(tokenizer, row)
    return "".join(f"{before}{text}{behind}" if learnt else text for text, learnt in pieces)


def parts(tokenizer: Any, row: Any) -> list[tuple[str, bool]]:
    """A row's text in pieces, each with whether it is learnt."""
    ids, trained = row
    runs = groupby(zip(ids.tolist(), trained.tolist(), strict=True), lambda token: token[1])
    return [
        (CONTROL.sub(_spelt, str(tokenizer.decode([token for token, _ in run]))), bool(learnt))
        for learnt, run in runs
    ]


def _spelt(sign: re.Match[str]) -> str:
    """A sign that would change the terminal, as an escape that does not."""
    return sign[0].encode("unicode_escape").decode()


def histogram(lengths: Any) -> str:
    """Rows by their length, in lines of blocks."""
    counts, edges = np.histogram(lengths, bins=BARS)
    words = [f"{int(a):>6}–{int(b):<6}" for a, b in pairwise(edges)]
    bars = [("█" * round(WIDTH * count / counts.max()), count) for count in counts.tolist()]
    middle, most = np.percentile(lengths, (50, 95))
    head = (
        f"tokens of a row: median {middle:.0f}, 95 % have at most {most:.0f}, "
        f"longest {lengths.max()}"
    )
    return "\n".join([head, *(f"{w} {b} {c:,}" for w, (b, c) in zip(words, bars, strict=True))])


def efficiency(config: Config, loader: Any) -> Iterator[str]:
    """How many of the computed positions are tokens, as configured and otherwise."""
    from launcher.data.build import arrange

    ways = {
        "as they come": replace(config.data, packing=False, group_by_length=False),
        "data.group_by_length=true": replace(config.data, packing=False, group_by_length=True),
        "data.packing=true": replace(config.data, packing=True, group_by_length=False),
    }
    training = config.training
    yield (
        f"positions that are tokens, in batches of training.micro_batch_size="
        f"{training.micro_batch_size} of {training.global_batch_size}:"
    )
    for way, data in ways.items():
        arranged = arrange(loader, data, training.seed)
        steps = range(min(arranged.steps_per_epoch, STEPS_LOOKED_AT))
        tokens, positions = np.sum([arranged.extent(step) for step in steps], axis=0)
        chosen = "  ← as configured" if data == config.data else ""
        yield (
            f"  {way:<26} {tokens / positions:6.1%}   {arranged.steps_per_epoch:,} steps an epoch"
            f"{chosen}"
        )


def draw(lengths: Any, max_length: int, picture: Path) -> None:
    """The histogram as a picture, with the length at which rows are cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=60)
    axes.axvline(max_length, color="tab:red", label=f"data.max_length={max_length}")
    axes.set(xlabel="tokens of a row", ylabel="rows", title="Lengths of rows")
    axes.legend()
    figure.savefig(picture, dpi=120)


def _load(config: Config, say: Callable[[str], None]) -> tuple[Any, Any]:
    from launcher.data.build import build_loaders
    from launcher.data.loader import Loader
    from launcher.model.folder import model_folder
    from launcher.model.tokenizer import load_tokenizer

    model, training = config.model, config.training
    folder = model_folder(model.name_or_path, model.revision, model.trust_remote_code)
    chat = config.data.format != "text"
    tokenizer = load_tokenizer(folder, model.trust_remote_code, chat, config.data.template)
    deal = partial(
        Loader,
        rank=0,
        world_size=1,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
    )
    return build_loaders(config.data, tokenizer, training.seed, deal, say, _go_on), tokenizer


def _go_on() -> None:
    """Nobody stops a preview but by ctrl-c."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway data",
        usage="%(prog)s preview [options] [OVERRIDE ...]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preview", choices=["preview"], help="the one thing to do with data")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="show so many rows; 3")
    parser.add_argument("--row", type=int, metavar="I", help="show this one alone, from 0")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the picture (.png, .svg); lengths.png"
    )
    parser.add_argument("--overwrite", action="store_true", help="even where FILE exists")
    parser.add_argument("--no-picture", action="store_true", help="print alone")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no picture")
    return parser


if __name__ == "__main__":
    main()
