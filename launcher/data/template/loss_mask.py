"""Segments of text to token ids and loss masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.segments import Segment
from launcher.errors import UserError
from launcher.folders.brief import brief


@dataclass(frozen=True)
class Tokens:
    """The tokens of one row."""

    ids: list[int]
    loss_mask: list[bool]  # True: the token belongs to an answer and its prediction is in the loss
    truncated: bool = False  # the row had more tokens than max_length and was cut
    too_long: bool = False  # the row had more tokens than max_length and has none left
    split: bool = False  # the row had more tokens than max_length, and this is its first part
    unended: int = 0  # answers whose last token in the loss is not a special token


def fit(tokens: Tokens, max_length: int, too_long: str) -> Iterator[Tokens]:
    """`tokens` as rows of at most `max_length` tokens.

    `too_long` is what happens to a longer row: cut, drop (the row is empty) or split.
    """
    length = len(tokens.ids)
    if length <= max_length:
        yield tokens
    elif too_long == "drop":
        yield Tokens([], [], too_long=True)
    else:
        ends = range(max_length, length + max_length, max_length)
        splits = too_long == "split"
        for end in ends if splits else ends[:1]:
            part = slice(end - max_length, end)
            yield Tokens(
                tokens.ids[part],
                tokens.loss_mask[part],
                truncated=not splits,
                split=splits and end == max_length,
            )


def tokenize_segments(
    template: ChatTemplate, rows: list[list[Segment]], counts_ends: bool = True
) -> Iterator[Tokens]:
    """The tokens of each row, given as the segments that `render_segments` returns.

    `counts_ends`: every segment in the loss is an answer, so count those that end in no special
    token.

    All rows are tokenized in one call, but each segment separately, as at inference: there the
    prompt is tokenized alone, and the answer follows. The loss covers an answer up to and including
    its end-of-turn token.
    """
    tokenizer = template.tokenizer
    first_texts = [text for row in rows for text, _ in row[:1]]
    later_texts = [text for row in rows for text, _ in row[1:]]
    first_ids = iter(_encode(tokenizer, first_texts, prefix=""))
    later_ids = iter(_encode_continuations(tokenizer, later_texts))
    find_end = EndFinder(template)
    for row in rows:
        ids: list[int] = []
        loss_mask: list[bool] = []
        unended = 0
        for index, (_, in_loss) in enumerate(row):
            segment_ids = next(later_ids if index else first_ids)
            ids += segment_ids
            end = 0
            if in_loss:
                next_in_loss = index + 1 < len(row) and row[index + 1][1]
                end = len(segment_ids) if next_in_loss else find_end(segment_ids)
                is_end = end and not next_in_loss and counts_ends
                unended += bool(is_end and segment_ids[end - 1] not in template.special_ids)
            loss_mask += [position < end for position in range(len(segment_ids))]
        yield Tokens(ids, loss_mask, unended=unended)


class EndFinder:
    """Finds how many tokens of an answer are in the loss: up to its end-of-turn token.

    The space and the special tokens that a template puts after that token are not in the loss. Text
    after the last special token is: then that token does not end the answer.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._special = template.special_ids
        self._end_token = template.tokenizer.eos_token_id

        @lru_cache(maxsize=1024)  # nearly all answers end alike
        def has_text(ids: tuple[int, ...]) -> bool:
            text = template.tokenizer.decode(list(ids), skip_special_tokens=True)
            return bool(str(text).strip())

        self._has_text = has_text

    def __call__(self, ids: list[int]) -> int:
        end_tokens = {self._end_token} if self._end_token in ids else self._special
        last = next((i for i in reversed(range(len(ids))) if ids[i] in end_tokens), None)
        if last is None or self._has_text(tuple(ids[last + 1 :])):
            return len(ids)
        return last + 1


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], prefix: str) -> list[list[int]]:
    """The token ids of `prefix` + text for each text, in one call."""
    if not texts:
        return []
    try:
        ids: list[list[int]] = tokenizer(
            [prefix + text for text in texts], add_special_tokens=False, verbose=False
        )["input_ids"]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: not an Exception
            raise
        if len(texts) == 1:
            raise UserError(
                f"the tokenizer gives up on the text {brief(texts[0])}: {error} → another text, or "
                "another tokenizer.json"
            ) from error
        return [ids for text in texts for ids in _encode(tokenizer, [text], prefix)]
    return ids


def _encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of texts that follow another text.

    Some tokenizers (SentencePiece's) put a space before every input. For these, a newline is put
    before each text, and its tokens are removed again.
    """
    if not texts:
        return []
    (letter,) = _encode(tokenizer, ["a"], prefix="")
    if not tokenizer.convert_ids_to_tokens(letter)[0].startswith("▁"):
        return _encode(tokenizer, texts, prefix="")
    (newline,) = _encode(tokenizer, [""], prefix="\n")
    with_newline = _encode(tokenizer, texts, prefix="\n")
    continuations = [ids[len(newline) :] for ids in with_newline if ids[: len(newline)] == newline]
    if len(continuations) < len(with_newline):
        raise UserError(
            "the tokenizer merges a newline with the text after it, so answers cannot be tokenized "
            "separately from their prompts"
        )
    return continuations
