"""Chat messages to token ids and the mask of what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from launcher.data.source import Message
from launcher.errors import UserError


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    trained: list[bool]  # True where the token is an answer's: its prediction is learnt
    cut: bool  # the row was longer than what is kept


def tokenize(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], max_length: int, place: str
) -> Tokens:
    """Every assistant turn is learnt, up to and including its end-of-turn token.

    The text is cut where an answer begins and ends and each piece is tokenised by itself, as at
    inference: there the prompt is tokenised alone, and the answer is what follows.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for text, learnt in _pieces(tokenizer, messages, place):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        end = _end_of_turn(piece, tokenizer.eos_token_id) if learnt else 0
        trained += [at < end for at in range(len(piece))]
    return Tokens(ids[:max_length], trained[:max_length], cut=len(ids) > max_length)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: str
) -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, is an answer)."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], place, add_generation_prompt=True)
        answered = _render(tokenizer, messages[: turn + 1], place)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise UserError(
                f"{place}: the chat template rewrites earlier turns (at turn {turn + 1}), so its "
                "answers cannot be told apart; give the model folder another chat_template.jinja"
            )
        pieces += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
        done = answered
    return pieces


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: str, **options: Any
) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program: it raises what its author chose
        raise UserError(f"{place}: the chat template refuses this row: {error}") from error


def _end_of_turn(piece: list[int], end: int | None) -> int:
    """How many tokens of an answer are learnt: what a template puts behind the end-of-turn token
    (a newline) is not."""
    return len(piece) - piece[::-1].index(end) if end in piece else len(piece)
