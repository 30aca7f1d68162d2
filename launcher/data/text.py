"""Raw text to token ids: every token is learnt."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from launcher.data.chat import Tokens


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int | None
) -> Iterator[Tokens]:
    """The tokens of each text, which begins as the tokenizer has it and ends with the end token.
    What is beyond `max_length` is cut."""
    if not texts:
        return
    end = tokenizer.eos_token_id
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        cut = max_length is not None and len(ids) > max_length
        ids = ids[:max_length]
        yield Tokens(ids, [True] * len(ids), cut)
