"""Raw text to token ids. Every token is in the loss."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from launcher.data.source import PART_CHARACTERS, TextPart
from launcher.data.template.loss_mask import Tokens


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: list[TextPart]) -> Iterator[Tokens]:
    """The tokens of each text.

    A text starts with the tokens that the tokenizer adds at the start, if any, and ends with the
    end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    for part in texts:
        ids = [token for piece in _split(part) for token in _token_ids(tokenizer, piece)]
        if part.is_last and end is not None and ids[-1:] != [end]:
            ids.append(end)
        yield Tokens(ids, [True] * len(ids))


def _token_ids(tokenizer: PreTrainedTokenizerBase, piece: TextPart) -> list[int]:
    ids: list[int] = tokenizer(piece.text, verbose=False, add_special_tokens=piece.is_first)[
        "input_ids"
    ]
    # Some tokenizers append the end token to every input, which is too early inside a text.
    return ids[:-1] if not piece.is_last and ids[-1:] == [tokenizer.eos_token_id] else ids


def _split(part: TextPart) -> Iterator[TextPart]:
    """Pieces of a long text, cut at the ends of lines. A tokenizer needs about a hundred times the
    size of its input in memory."""
    text, is_first = part.text, part.is_first
    while len(text) > 2 * PART_CHARACTERS:
        end = text.find("\n", PART_CHARACTERS) + 1 or 2 * PART_CHARACTERS
        yield TextPart(text[:end], is_first, is_last=False)
        text, is_first = text[end:], False
    yield TextPart(text, is_first, part.is_last)
