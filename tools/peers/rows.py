"""The rows that all arms train on: synthetic or from a file, none longer than max_length."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from launcher.config.schema.data import SourceConfig
from launcher.data import source
from launcher.data.rows.row_formats import Conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.loss_mask import tokenize_segments
from launcher.data.template.segments import render_segments
from launcher.errors import UserError
from launcher.folders import paths

Row = dict[str, Any]
FIELDS = ("instruction", "input", "output")
# Number of words in instruction and answer, as (mean, standard deviation) of the logarithm: similar
# to rows written by a strong model.
ASKED, ANSWERED, MOST_WORDS = (2.25, 0.35), (4.2, 1.0), 300


def made_up(count: int, seed: int) -> list[Row]:
    """`count` synthetic alpaca rows, the same for the same seed: lengths as in real rows, words
    from the bundled rows."""
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
    and an answer, because the peers read such rows differently."""
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
    """The rows that fit, with the number of tokens of each. Longer rows are left out, because each
    system truncates them differently. Raises UserError if no row fits."""
    kept, lengths = [], []
    template = ChatTemplate(tokenizer)
    for number, row in enumerate(rows):
        place = f"row {number}"
        talk = _talk(SourceConfig(format="alpaca"), place, row)
        segments = render_segments(template, talk, "answers", place)
        (tokens,) = tokenize_segments(template, segments)
        if len(tokens.ids) <= max_length:
            kept.append(row)
            lengths.append(len(tokens.ids))
    if not kept:
        raise UserError(f"no row fits into --max-length {max_length}; raise it")
    return kept, lengths


def _talk(where: SourceConfig, place: str, row: Row) -> Conversation:
    """Convert a row to a conversation. Raises UserError for an invalid row."""
    talk = source.parse_row(where, place, row)
    assert isinstance(talk, Conversation)
    return talk


def write(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
