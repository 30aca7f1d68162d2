"""Conversations to token ids and the mask of what is learnt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from launcher.data.formats import Conversation, Message
from launcher.errors import UserError

Piece = tuple[str, bool]  # a text, and whether it is learnt

# A template that says itself what the assistant writes: {% generation %} … {% endgeneration %}.
MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    trained: list[bool]  # True where the token is an answer's: its prediction is learnt
    cut: bool  # the row was longer than what is kept


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[Piece]], max_length: int
) -> Iterator[Tokens]:
    """The tokens of each of `rows`, which `pieces` has cut; all are tokenised in one call.

    A piece is tokenised by itself, as at inference: there the prompt is tokenised alone, and the
    answer is what follows. An answer is learnt up to and including its end-of-turn token.
    """
    texts = [text for row in rows for text, _ in row]
    found = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    for row in rows:
        ids: list[int] = []
        trained: list[bool] = []
        for at, (_, learnt) in enumerate(row):
            piece = next(found)
            ids += piece
            whole = learnt and at + 1 < len(row) and row[at + 1][1]  # what follows is learnt too
            end = _learnt(piece, whole, tokenizer.eos_token_id) if learnt else 0
            trained += [number < end for number in range(len(piece))]
        yield Tokens(ids[:max_length], trained[:max_length], cut=len(ids) > max_length)


def pieces(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, train_on: str, place: str
) -> list[list[Piece]]:
    """The rendered conversation cut where an answer begins and ends: a row of pieces.

    Where the template rewrites earlier turns (drops past reasoning, say) each answer is a row of
    its own behind the prompt that it would be given at inference. Raises UserError where the
    template refuses the conversation, or leaves out tools, calls or reasoning.
    """
    last = max(at for at, m in enumerate(conversation.messages) if m["role"] == "assistant")
    talk = Conversation(conversation.messages[: last + 1], conversation.tools)
    if MARKS_ANSWERS.search(_template(tokenizer)):
        rows = [_by_marks(tokenizer, talk, place)]
    else:
        rows = _by_prompts(tokenizer, talk, place)
    _check_written(talk, rows, place)
    if train_on == "last_answer":
        rows = [_last_alone(rows[-1])]
    elif train_on == "all":
        rows = [[(text, True) for text, _ in row] for row in rows]
    return rows


def _by_prompts(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, place: str
) -> list[list[Piece]]:
    """An answer is what follows its prompt in the rendered text."""
    exchanges = list(_exchanges(tokenizer, talk, place))
    row: list[Piece] = []
    done = ""
    for prompt, answer in exchanges:
        if not prompt.startswith(done):
            return [[(prompt, False), (answer, True)] for prompt, answer in exchanges]
        row += [(prompt[len(done) :], False), (answer, True)]
        done = prompt + answer
    return [row]


def _exchanges(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, place: str
) -> Iterator[tuple[str, str]]:
    """(everything before it, answer) of each assistant turn."""
    for turn, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        if turn and talk.messages[turn - 1]["role"] == "assistant":
            prompt = _render(tokenizer, talk.messages[:turn], talk.tools, place)
        else:
            prompt = _render(
                tokenizer, talk.messages[:turn], talk.tools, place, add_generation_prompt=True
            )
        answered = _render(tokenizer, talk.messages[: turn + 1], talk.tools, place)
        if not answered.startswith(prompt):
            raise UserError(
                f"{place}: the chat template writes turn {turn + 1} otherwise once it is answered, "
                "so the answer cannot be told apart → data.template=NAME or FILE.jinja"
            )
        yield prompt, answered[len(prompt) :]


def _by_marks(tokenizer: PreTrainedTokenizerBase, talk: Conversation, place: str) -> list[Piece]:
    """The template marks what the assistant writes."""
    try:
        (text,), (spans,) = render_jinja_template(
            [talk.messages],
            tools=talk.tools or None,
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program: it raises what its author chose
        raise UserError(f"{place}: the chat template refuses this row: {error}") from error
    row, done = [], 0
    for begin, end in spans:
        row += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    return row


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any],
    place: str,
    **options: Any,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)
        )
    except Exception as error:  # a template is a program: it raises what its author chose
        raise UserError(f"{place}: the chat template refuses this row: {error}") from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.get_chat_template())


def _check_written(talk: Conversation, rows: list[list[Piece]], place: str) -> None:
    """Templates leave out what they do not know, without a word."""
    text = "".join(piece for row in rows for piece, _ in row)
    for what, word in _must_be_written(talk):
        if word.strip() not in text:
            raise UserError(
                f"{place}: the chat template leaves out {what} → data.template=hermes, or another "
                "that writes them (docs/data.md)"
            )


def _must_be_written(talk: Conversation) -> Iterable[tuple[str, str]]:
    for tool in talk.tools:
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        yield "tools", str(function["name"]) if "name" in function else ""
    for message in talk.messages:
        for call in message["tool_calls"] if "tool_calls" in message else ():
            yield "tool calls", str(call["function"]["name"])
        if "reasoning_content" in message:
            yield "reasoning_content", message["reasoning_content"]


def _last_alone(row: list[Piece]) -> list[Piece]:
    last = max(at for at, (_, learnt) in enumerate(row) if learnt)
    return [(text, at == last) for at, (text, _) in enumerate(row)]


def _learnt(piece: list[int], whole: bool, end: int | None) -> int:
    """How many tokens of a learnt piece are: what a template puts behind the end-of-turn token of
    an answer (a newline) is not."""
    if whole or end not in piece:
        return len(piece)
    return len(piece) - piece[::-1].index(end)
