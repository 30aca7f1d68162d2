"""Raw rows to arrays of token ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.data import source
from launcher.data.files.file_rows import RawRow
from launcher.data.raw_text import tokenize_texts
from launcher.data.rows.row_formats import Conversation
from launcher.data.source import ParsedRow
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.loss_mask import Tokens, fit, tokenize_segments
from launcher.data.template.segments import Segment, render_segments
from launcher.errors import UserError
from launcher.io import limits
from launcher.io.limits import LimitExceeded
from launcher.io.template_sizes import size_of

# A note that does not change the rows: they are tokenized as in every version.
SPECIAL_TOKENS = "texts contain special tokens, which are tokenized as such and not as text"
# A template that never ends does not cost data.row_seconds for every row.
MAX_ENDLESS_ROWS = 3
USUAL_CHARACTERS = 400_000  # about 100,000 tokens: longer rows may take longer,
MAX_EXTENSION = 4.0  # as many times as long


@dataclass
class TokenBatch:
    """The token ids of several rows, concatenated, and counts of rows that are left out."""

    ids: NDArray[np.int32]  # [total]
    loss_mask: NDArray[np.bool_]  # [total]
    lengths: NDArray[np.int32]  # [rows]
    dropped: int = 0  # rows without a token in the loss within max_length
    truncated: int = 0  # rows cut at max_length
    too_long: int = 0  # rows left out because they have more tokens than max_length
    split: int = 0  # rows split at max_length
    unended: int = 0  # answers that do not end with a special token
    errors: list[str] = field(default_factory=list)  # one message for each row that is skipped
    notes: Counter[str] = field(default_factory=Counter)  # what the log says → number of rows


@dataclass(frozen=True)
class RowTokenizer:
    """Tokenizes raw rows of one source."""

    source: SourceConfig
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int | None = None  # rows of the embedding; None: not checked
    endless: list[str] = field(default_factory=list, compare=False)  # rows that took too long

    def __call__(self, rows: list[RawRow]) -> TokenBatch:
        """Raises UserError for the first bad row if data.on_bad_row=fail."""
        errors: list[str] = []
        notes: Counter[str] = Counter()
        tokens = []
        for location, row in self._tokenize(rows, errors, notes):
            if fault := self._unknown_token(location, row):
                self._handle(UserError(fault), errors)
            elif self.concatenates:
                tokens.append(row)
            else:
                tokens += fit(row, self.config.max_length, self.too_long)
        return make_batch(tokens, errors, self.concatenates, notes)

    @property
    def concatenates(self) -> bool:
        """Whether the rows are texts that `tokenize_source` concatenates afterward."""
        return self.source.format == "text" and self.config.concatenate

    @property
    def too_long(self) -> str:
        """What happens to a row with too many tokens: cut, drop or split."""
        if self.config.too_long != "auto":
            return self.config.too_long
        if self.source.format != "text":
            return "drop"  # without its end token, a model would learn not to stop
        return "cut" if self.config.streaming else "split"

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises UserError for an argument that the template does not read."""
        template = ChatTemplate(
            self.tokenizer, self.config.template_arguments, self.config.template_date
        )
        template.check_arguments(self.config.template_arguments, "data.template_arguments")
        return template

    @cached_property
    def embeddings(self) -> int | None:
        """The number of embeddings if the tokenizer has tokens without one, otherwise None."""
        size = self.vocabulary_size
        return size if size is not None and len(self.tokenizer) > size else None

    def _tokenize(
        self, rows: list[RawRow], errors: list[str], notes: Counter[str]
    ) -> Iterator[tuple[str, Tokens]]:
        """The location and the tokens of each row; `errors` and `notes` receive what is said."""
        texts: list[source.TextPart] = []
        segmented: list[list[Segment]] = []
        locations: list[str] = []
        is_text = self.source.format == "text"
        template = None if is_text else self.template
        for location, row in rows:
            try:
                parsed, made = self._parse(location, row)
                if isinstance(parsed, source.TextPart):
                    texts.append(parsed)
                    locations.append(location)
                else:
                    segmented += made
                    locations += [location] * len(made)
                    notes.update(self._special_tokens_in(parsed))
                notes.update(parsed.notes)
            except UserError as error:
                self._handle(error, errors)
        if template is None:
            tokens = tokenize_texts(self.tokenizer, texts)
        else:
            # With train_on=all, prompts are in the loss too.
            tokens = tokenize_segments(template, segmented, self.config.train_on != "all")
        return zip(locations, tokens, strict=True)

    def _parse(self, location: str, row: Any) -> tuple[ParsedRow, list[list[Segment]]]:
        """The conversation or text of a row, and the segments of a conversation."""

        def parse() -> tuple[ParsedRow, list[list[Segment]]]:
            parsed = source.parse_row(self.source, location, row)
            if isinstance(parsed, source.TextPart):
                return parsed, []
            return parsed, self._render(parsed, location)

        try:
            return limits.within(self.config.row_seconds, parse, partial(_extension, row))
        except LimitExceeded as error:
            raise self._endless(location, error) from error

    def _endless(self, location: str, error: LimitExceeded) -> UserError:
        """The error of a row that takes too long."""
        others = f" (and so did {', '.join(self.endless)})" if self.endless else ""
        self.endless.append(location)
        return UserError(
            f"{location}: the chat template {error} for this row{others} → a shorter row, or "
            f"another data.template; data.row_seconds={10 * self.config.row_seconds:g} allows more"
        )

    def _render(self, conversation: Conversation, location: str) -> list[list[Segment]]:
        config = self.config
        return render_segments(
            self.template, conversation, config.train_on, location, config.learn_empty_reasoning
        )

    @cached_property
    def _special_token(self) -> re.Pattern[str] | None:
        added = self.tokenizer.added_tokens_decoder.values()
        special = [re.escape(token.content) for token in added if token.special]
        return re.compile("|".join(sorted(special, key=len, reverse=True))) if special else None

    def _special_tokens_in(self, conversation: Conversation) -> Iterator[str]:
        """A note if a text contains what the tokenizer reads as the end or start of a turn."""
        texts = (message.get("content") for message in conversation.messages)
        if self._special_token and any(text and self._special_token.search(text) for text in texts):
            yield SPECIAL_TOKENS

    def _handle(self, error: UserError, errors: list[str]) -> None:
        if self.config.on_bad_row == "fail" or len(self.endless) == MAX_ENDLESS_ROWS:
            raise error
        errors.append(str(error))

    def _unknown_token(self, location: str, row: Tokens) -> str | None:
        """The fault of a row with a token that the model has no embedding for."""
        if self.embeddings is None or (largest := max(row.ids, default=0)) < self.embeddings:
            return None
        return (
            f"{location} contains {self.tokenizer.convert_ids_to_tokens(largest)}, token {largest} "
            f"of the tokenizer, but the model has embeddings for {self.embeddings} tokens → "
            "model.add_tokens=[…] for new tokens, or the tokenizer of this model"
        )


def _extension(row: Any) -> float:
    """How much longer than others a long row may take: its prompts are rendered again and again."""
    return min(MAX_EXTENSION, size_of(row) / USUAL_CHARACTERS)


def make_batch(
    rows: list[Tokens],
    errors: list[str],
    concatenated: bool,
    notes: Counter[str] | None = None,
) -> TokenBatch:
    """The rows that have a token in the loss; all rows if they will be `concatenated`."""
    # The first token of a row is never predicted.
    used = rows if concatenated else [row for row in rows if any(row.loss_mask[1:])]
    ids = [token for row in used for token in row.ids]
    loss_mask = [in_loss for row in used for in_loss in row.loss_mask]
    too_long = sum(row.too_long for row in rows)
    return TokenBatch(
        np.asarray(ids, np.int32),
        np.asarray(loss_mask, np.bool_),
        np.asarray([len(row.ids) for row in used], np.int32),
        dropped=len(rows) - len(used) - too_long,
        truncated=sum(row.truncated for row in rows),
        too_long=too_long,
        split=sum(row.split for row in rows),
        unended=sum(row.unended for row in rows),
        errors=errors,
        notes=notes or Counter(),
    )
