"""Conversations to token ids and the mask of what is learnt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
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
    first = [text for row in rows for text, _ in row[:1]]
    later = [text for row in rows for text, _ in row[1:]]
    begins, follows = iter(_encoded(tokenizer, first, "")), iter(_following(tokenizer, later))
    added = tokenizer.added_tokens_decoder.items()
    ends = {number for number, token in added if token.special} | {*tokenizer.all_special_ids}
    for row in rows:
        ids: list[int] = []
        trained: list[bool] = []
        for at, (_, learnt) in enumerate(row):
            piece = next(follows if at else begins)
            ids += piece
            whole = learnt and at + 1 < len(row) and row[at + 1][1]  # what follows is learnt too
            end = _learnt(piece, whole, tokenizer.eos_token_id, ends) if learnt else 0
            trained += [number < end for number in range(len(piece))]
        yield Tokens(ids[:max_length], trained[:max_length], cut=len(ids) > max_length)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], before: str) -> list[list[int]]:
    """Each text behind `before`, in one call."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        [before + text for text in texts], add_special_tokens=False, verbose=False
    )["input_ids"]
    return found


def _following(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Texts that stand behind others. Some tokenizers (SentencePiece's) put a space before
    whatever they are given: they are given a line feed first, whose tokens are taken away."""
    if not texts:
        return []
    (alone,) = _encoded(tokenizer, ["a"], "")
    if not tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁"):
        return _encoded(tokenizer, texts, "")
    (feed,) = _encoded(tokenizer, [""], "\n")
    found = _encoded(tokenizer, texts, "\n")
    kept = [ids[len(feed) :] for ids in found if ids[: len(feed)] == feed]
    if len(kept) < len(found):
        raise UserError(
            "the tokenizer joins a line feed with what follows it, so that answers cannot be "
            "tokenised apart from their prompts"
        )
    return kept


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
    _check_written(tokenizer, talk, place)
    if train_on == "last_answer":
        rows = [_last_alone(rows[-1])]
    elif train_on == "all":
        rows = _all_once(rows)
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
        before, tools = talk.messages[:turn], talk.tools
        prompt = _render(tokenizer, before, tools, place, add_generation_prompt=True)
        answered = _render(tokenizer, talk.messages[: turn + 1], tools, place)
        if not answered.startswith(prompt) and turn and before[-1]["role"] == "assistant":
            prompt = _render(tokenizer, before, tools, place)  # goes on without a new turn
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
    if not row:
        raise UserError(f"{place}: the chat template marks nothing as the assistant's")
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


def _check_written(tokenizer: PreTrainedTokenizerBase, talk: Conversation, place: str) -> None:
    """Templates leave out what they do not know, without a word: then they write the same text
    without it."""

    def refuse_if_same(what: str, messages: list[Message], without: list[Message]) -> None:
        tools = talk.tools if what != "tools" else []
        whole = _render(tokenizer, messages, talk.tools, place)
        with suppress(UserError):  # a template that misses it has seen it
            if _render(tokenizer, without, tools, place) == whole:
                raise _LeftOut(what)

    try:
        if talk.tools:
            refuse_if_same("tools", talk.messages, talk.messages)
        for turn, message in enumerate(talk.messages):
            for key in ("tool_calls", "reasoning_content"):
                if key in message:
                    before = talk.messages[:turn]
                    bare = {name: value for name, value in message.items() if name != key}
                    refuse_if_same(key, [*before, message], [*before, bare])
    except _LeftOut as error:
        raise UserError(
            f"{place}: the chat template leaves out {error} → data.template=hermes, or another "
            "that writes them (docs/data.md)"
        ) from error


class _LeftOut(Exception):
    pass


def _all_once(rows: list[list[Piece]]) -> list[list[Piece]]:
    """Everything is learnt; what several rows begin with, of the first."""
    found, before = [], ""
    for row in rows:
        text = "".join(piece for piece, _ in row)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
        common = text[: sum(1 for _ in same)]
        found.append([(common, False), (text[len(common) :], True)] if before else [(text, True)])
        before = text
    return found


def _last_alone(row: list[Piece]) -> list[Piece]:
    last = max(at for at, (_, learnt) in enumerate(row) if learnt)
    return [(text, at == last) for at, (text, _) in enumerate(row)]


def _learnt(piece: list[int], whole: bool, end: int | None, special: set[int]) -> int:
    """How many tokens of a learnt piece are: what a template puts behind the end-of-turn token of
    an answer (a newline) is not."""
    if whole:
        return len(piece)
    ends = {end} if end in piece else special
    last = [at for at, token in enumerate(piece) if token in ends][-1:]
    return last[0] + 1 if last else len(piece)
