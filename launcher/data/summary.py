"""What happened to the rows of a source while they were tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.data.tokenize import TokenBatch
from launcher.folders.json_file import is_count

UNENDED = "answers do not end with a special token: a model does not learn to stop (docs/data.md)"
COUNTS = (
    *("rows", "tokens", "dropped", "truncated", "too_long", "split", "unended", "skipped"),
)  # fmt: skip
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
    def from_facts(cls, facts: Mapping[str, Any]) -> Summary:
        """The summary that `facts` returned. Raises KeyError or TypeError for others."""
        counts = {name: facts[name] for name in COUNTS}
        counts["loss_tokens"] = facts["learned"]
        errors, notes = facts["bad"], dict(facts["notes"])
        if not all(is_count(count) for count in (*counts.values(), *notes.values())):
            raise TypeError("a count is not a number")
        if not isinstance(errors, list) or not all(isinstance(error, str) for error in errors):
            raise TypeError("bad is not a list of messages")
        return cls(**counts, errors=tuple(errors), notes=notes)

    def facts(self) -> dict[str, Any]:
        """As JSON, under the names on disk."""
        values = asdict(self)
        values["bad"], values["learned"] = list(values.pop("errors")), values.pop("loss_tokens")
        return values

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
