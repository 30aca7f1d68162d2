"""Raw text to token ids: every token is learnt."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from launcher.data.chat import Tokens
from launcher.data.source import PART_CHARACTERS, TextPart


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[TextPart], max_length: int | None
) -> Iterator[Tokens]:
    """The tokens of each text, which begins as the tokenizer has it and ends with the end token.
    What is beyond `max_length` is cut."""
    end = tokenizer.eos_token_id
    for part in texts:
        ids = [token for piece in _pieces(part) for token in _ids(tokenizer, piece)]
        if part.ends and end is not None and ids[-1:] != [end]:
            ids.append(end)
        cut = max_length is not None and len(ids) > max_length
        ids = ids[:max_length]
        yield Tokens(ids, [True] * len(ids), cut)


def _ids(tokenizer: PreTrainedTokenizerBase, piece: TextPart) -> list[int]:
    found: list[int] = tokenizer(piece.text, verbose=False, add_special_tokens=piece.begins)[
        "input_ids"
    ]
    # Some tokenizers end a text with its end token, which is too early within one.
    return found[:-1] if not piece.ends and found[-1:] == [tokenizer.eos_token_id] else found


def _pieces(part: TextPart) -> Iterator[TextPart]:
    """A long text is cut at ends of lines: a tokenizer needs a hundred times its size at once."""
    text, begins = part.text, part.begins
    while len(text) > 2 * PART_CHARACTERS:
        at = text.find("\n", PART_CHARACTERS) + 1 or 2 * PART_CHARACTERS
        yield TextPart(text[:at], begins, ends=False)
        text, begins = text[at:], False
    yield TextPart(text, begins, part.ends)
