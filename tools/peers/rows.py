"""The rows that all arms learn: made up, or of a file, none longer than what is kept of a row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from launcher.config.schema.data import SourceConfig
from launcher.data import source
from launcher.data.chat_template import render_segments, tokenize_segments
from launcher.data.row_formats import Conversation
from launcher.errors import UserError
from launcher.folders import paths

Row = dict[str, Any]
FIELDS = ("instruction", "input", "output")
# Words of instruction and answer, as (mean, standard deviation) of their logarithm: about those of
# rows that a strong model wrote.
ASKED, ANSWERED, MOST_WORDS = (2.25, 0.35), (4.2, 1.0), 300


def made_up(count: int, seed: int) -> list[Row]:
    """`count` alpaca rows, the same for the same seed: lengths as in real rows, words out of the
    bundled ones."""
    draw = random.Random(seed)
    bundled = SourceConfig(path=str(paths.bundled("demo/train.jsonl")), format="messages")
    talks = [_talk(bundled, place, row) for place, row in source.iter_rows(bundled, by_line=False)]
    words = " ".join(turn["content"] for talk in talks for turn in talk.messages).split()

    def text(mean: float, deviation: float) -> str:
        length = min(MOST_WORDS, max(1, round(draw.lognormvariate(mean, deviation))))
        begin = draw.randrange(len(words) - length)
        return " ".join(words[begin : begin + length])

    return [
        {"instruction": text(*ASKED), "input": "", "output": text(*ANSWERED)} for _ in range(count)
    ]


def of_file(path: Path, count: int) -> list[Row]:
    """The first `count` alpaca rows of `path`. Raises UserError for a row with more than a question
    and an answer: the peers read those in ways of their own."""
    rows: list[Row] = []
    alpaca = SourceConfig(path=str(path), format="alpaca", max_rows=count)
    for place, row in source.iter_rows(alpaca, by_line=False):
        _talk(alpaca, place, row)
        more = [name for name in row if name not in FIELDS and row[name]]
        if more:
            raise UserError(f"{place} has {more[0]}; give rows of {', '.join(FIELDS)} alone")
        rows.append({name: row.get(name) or "" for name in FIELDS})
    return rows


def fitting(rows: list[Row], tokenizer: Any, max_length: int) -> tuple[list[Row], list[int]]:
    """The rows that fit, with the tokens of each. Longer ones, which every system cuts at another
    place, are left out. Raises UserError when none fits."""
    kept, lengths = [], []
    for number, row in enumerate(rows):
        place = f"row {number}"
        talk = _talk(SourceConfig(format="alpaca"), place, row)
        cut = render_segments(tokenizer, talk, "answers", place)
        (tokens,) = tokenize_segments(tokenizer, cut, max_length)
        if not tokens.truncated:
            kept.append(row)
            lengths.append(len(tokens.ids))
    if not kept:
        raise UserError(f"no row fits into --max-length {max_length}; raise it")
    return kept, lengths


def _talk(where: SourceConfig, place: str, row: Row) -> Conversation:
    """Raises UserError for a row that is none."""
    talk = source.parse_row(where, place, row)
    assert isinstance(talk, Conversation)
    return talk


def write(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
