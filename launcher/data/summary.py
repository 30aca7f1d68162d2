"""What happened to the rows of a source while they were tokenized."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher.data.tokenize import TokenBatch

UNENDED = "answers do not end with a special token: a model does not learn to stop (docs/data.md)"
MAX_ERRORS = 20  # error messages of skipped rows that a summary keeps


@dataclass(frozen=True)
class Summary:
    """What happened to the rows of a source."""

    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0  # tokens in the loss mask
    dropped: int = 0  # rows without a token in the loss within max_length
    truncated: int = 0  # rows cut at max_length
    too_long: int = 0  # rows left out because they have more tokens than max_length
    split: int = 0  # rows split at max_length
    unended: int = 0  # answers that do not end with a special token
    skipped: int = 0  # rows that could not be read
    errors: tuple[str, ...] = ()  # the messages of the first skipped rows
    notes: Mapping[str, int] = field(default_factory=dict)  # remark → number of rows
    nbytes: int = 0  # size of the file of record batches

    def add(self, batch: TokenBatch) -> Summary:
        return Summary(
            rows=self.rows + len(batch.lengths),
            tokens=self.tokens + len(batch.ids),
            loss_tokens=self.loss_tokens + int(batch.loss_mask.sum()),
            dropped=self.dropped + batch.dropped,
            truncated=self.truncated + batch.truncated,
            too_long=self.too_long + batch.too_long,
            split=self.split + batch.split,
            unended=self.unended + batch.unended,
            skipped=self.skipped + len(batch.errors),
            errors=(*self.errors, *batch.errors)[:MAX_ERRORS],
            notes=dict(Counter(self.notes) + batch.notes),
        )

    @classmethod
    def read(cls, arrow_file: Path) -> Summary | None:
        """The summary of `arrow_file`, or None if the file is missing or incomplete."""
        try:
            values = {**json.loads(arrow_file.with_suffix(".json").read_text(encoding="utf-8"))}
            errors, loss_tokens = tuple(values.pop("bad")), values.pop("learned")
            summary = cls(**values, errors=errors, loss_tokens=loss_tokens)
            return summary if arrow_file.stat().st_size == summary.nbytes else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def to_json(self) -> str:
        values = asdict(self)
        # The names on disk.
        values["bad"], values["learned"] = values.pop("errors"), values.pop("loss_tokens")
        return json.dumps(values)

    def describe(self) -> str:
        text = (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.loss_tokens:,} of them in the loss"
        )
        if self.truncated:
            text += f"; {self.truncated:,} rows cut at data.max_length"
        if self.split:
            text += f"; {self.split:,} rows split at data.max_length"
        if self.too_long:
            text += f"; {self.too_long:,} rows left out: longer than data.max_length"
        if self.dropped:
            text += f"; {self.dropped:,} rows left out: no answer within data.max_length"
        if self.skipped:
            text += f"; {self.skipped:,} bad rows skipped, the first: {self.errors[0]}"
        if self.unended:
            text += f"; {UNENDED} ({self.unended:,} of them)"
        for note, rows in self.notes.items():
            text += f"; {note} ({rows:,} rows)"
        return text
