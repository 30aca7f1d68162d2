"""Raw text to token ids: every token is learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from launcher.data.chat import Tokens


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int, join: bool
) -> Iterator[Tokens]:
    """Rows of at most `max_length` tokens. Each text begins as the tokenizer has it and ends with
    the end token.

    With `join` the texts stand end to end and are cut into full rows (the last one may be short);
    else each is a row, and what is beyond `max_length` is lost.
    """
    waiting: list[int] = []
    for text in texts:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        if not join:
            yield _row(ids[:max_length], cut=len(ids) > max_length)
            continue
        waiting += ids
        full = len(waiting) // max_length * max_length
        for begin in range(0, full, max_length):
            yield _row(waiting[begin : begin + max_length])
        waiting = waiting[full:]
    if waiting:
        yield _row(waiting)


def _row(ids: list[int], cut: bool = False) -> Tokens:
    return Tokens(ids, [True] * len(ids), cut)
