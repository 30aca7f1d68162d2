"""Conversations to token ids and loss masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from launcher.data.row_formats import Conversation, Message
from launcher.errors import UserError

Segment = tuple[str, bool]  # a part of a rendered conversation, and whether it is in the loss

# A template with {% generation %} … {% endgeneration %} marks what the assistant writes.
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one row."""

    ids: list[int]
    loss_mask: list[bool]  # True: the token belongs to an answer and its prediction is in the loss
    truncated: bool  # the row had more tokens than max_length


def tokenize_segments(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[Segment]], max_length: int
) -> Iterator[Tokens]:
    """The tokens of each row, given as the segments that `render_segments` returns.

    All rows are tokenized in one call, but each segment separately, as at inference: there the
    prompt is tokenized alone, and the answer follows. The loss covers an answer up to and including
    its end-of-turn token.
    """
    first_texts = [text for row in rows for text, _ in row[:1]]
    later_texts = [text for row in rows for text, _ in row[1:]]
    first_ids = iter(_encode(tokenizer, first_texts, prefix=""))
    later_ids = iter(_encode_continuations(tokenizer, later_texts))
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} | {*tokenizer.all_special_ids}
    for row in rows:
        ids: list[int] = []
        loss_mask: list[bool] = []
        for index, (_, in_loss) in enumerate(row):
            segment_ids = next(later_ids if index else first_ids)
            ids += segment_ids
            next_in_loss = in_loss and index + 1 < len(row) and row[index + 1][1]
            end = (
                _loss_end(segment_ids, next_in_loss, tokenizer.eos_token_id, special)
                if in_loss
                else 0
            )
            loss_mask += [position < end for position in range(len(segment_ids))]
        yield Tokens(ids[:max_length], loss_mask[:max_length], truncated=len(ids) > max_length)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], prefix: str) -> list[list[int]]:
    """The token ids of `prefix` + text for each text, in one call."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        [prefix + text for text in texts], add_special_tokens=False, verbose=False
    )["input_ids"]
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


def render_segments(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, train_on: str, location: str
) -> list[list[Segment]]:
    """Render the conversation and split it where an answer begins and ends.

    The result is one row of segments. If the template rewrites earlier turns (for example, drops
    their reasoning), it is one row for each answer, after the prompt that the model would get at
    inference. `location` names the row in error messages. Raises UserError if the template refuses
    the conversation, or leaves out tools, tool calls or reasoning.
    """
    messages = conversation.messages
    last = max(index for index, m in enumerate(messages) if m["role"] == "assistant")
    conversation = Conversation(messages[: last + 1], conversation.tools)
    if GENERATION_BLOCK.search(_template(tokenizer)):
        rows = [_split_by_generation_blocks(tokenizer, conversation, location)]
    else:
        rows = _split_by_prompts(tokenizer, conversation, location)
    _check_nothing_omitted(tokenizer, conversation, location)
    if train_on == "last_answer":
        rows = [_keep_last_answer(rows[-1])]
    elif train_on == "all":
        rows = _put_all_in_loss(rows)
    return rows


def _split_by_prompts(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, location: str
) -> list[list[Segment]]:
    """An answer is the rendered text that follows its prompt."""
    pairs = list(_prompts_and_answers(tokenizer, conversation, location))
    row: list[Segment] = []
    done = ""
    for prompt, answer in pairs:
        if not prompt.startswith(done):
            return [[(prompt, False), (answer, True)] for prompt, answer in pairs]
        row += [(prompt[len(done) :], False), (answer, True)]
        done = prompt + answer
    return [row]


def _prompts_and_answers(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, location: str
) -> Iterator[tuple[str, str]]:
    """(all text before the answer, answer) of each assistant turn."""
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before, tools = conversation.messages[:turn], conversation.tools
        prompt = _render(tokenizer, before, tools, location, add_generation_prompt=True)
        answered = _render(tokenizer, conversation.messages[: turn + 1], tools, location)
        if not answered.startswith(prompt) and turn and before[-1]["role"] == "assistant":
            prompt = _render(tokenizer, before, tools, location)  # continues the previous answer
        if not answered.startswith(prompt):
            raise UserError(
                f"{location}: the chat template renders the prompt of message {turn + 1} "
                "differently once the answer follows, so it is unclear where the answer starts → "
                "data.template=NAME or FILE.jinja"
            )
        yield prompt, answered[len(prompt) :]


def _split_by_generation_blocks(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, location: str
) -> list[Segment]:
    """The template marks what the assistant writes."""
    try:
        (text,), (spans,) = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools or None,
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program and may raise anything
        raise UserError(f"{location}: the chat template refuses this row: {error}") from error
    row, done = [], 0
    for begin, end in spans:
        row += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    if not row:
        raise UserError(f"{location}: the chat template marks no text as the assistant's")
    return row


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any],
    location: str,
    **options: Any,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)
        )
    except Exception as error:  # a template is a program and may raise anything
        raise UserError(f"{location}: the chat template refuses this row: {error}") from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.get_chat_template())


class _OmittedError(Exception):
    """The chat template leaves out a field of the conversation; the message is its name."""


def _check_nothing_omitted(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, location: str
) -> None:
    """Raises UserError if the template leaves out tools, tool calls or reasoning.

    A template silently leaves out what it does not know. It then renders the same text without it.
    """

    def check(field: str, messages: list[Message], without: list[Message]) -> None:
        tools = conversation.tools if field != "tools" else []
        rendered = _render(tokenizer, messages, conversation.tools, location)
        with suppress(UserError):  # a template that requires the field does not leave it out
            if _render(tokenizer, without, tools, location) == rendered:
                raise _OmittedError(field)

    try:
        if conversation.tools:
            check("tools", conversation.messages, conversation.messages)
        for turn, message in enumerate(conversation.messages):
            for key in ("tool_calls", "reasoning_content"):
                if key in message:
                    before = conversation.messages[:turn]
                    bare = {name: value for name, value in message.items() if name != key}
                    check(key, [*before, message], [*before, bare])
    except _OmittedError as error:
        raise UserError(
            f"{location}: the chat template leaves out {error} → data.template=hermes, or another "
            "that writes them (docs/data.md)"
        ) from error


def _put_all_in_loss(rows: list[list[Segment]]) -> list[list[Segment]]:
    """All text is in the loss; text that a row shares with the row before it only once."""
    result, previous = [], ""
    for row in rows:
        text = "".join(segment for segment, _ in row)
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(previous, text, strict=False))
        shared = text[: sum(1 for _ in equal)]
        result.append(
            [(shared, False), (text[len(shared) :], True)] if previous else [(text, True)]
        )
        previous = text
    return result


def _keep_last_answer(row: list[Segment]) -> list[Segment]:
    """The same text with only the last answer in the loss."""
    last = max(index for index, (_, in_loss) in enumerate(row) if in_loss)
    return [(text, index == last) for index, (text, _) in enumerate(row)]


def _loss_end(ids: list[int], next_in_loss: bool, end_token: int | None, special: set[int]) -> int:
    """How many tokens of an answer are in the loss: the text that a template puts after the
    end-of-turn token (a newline) is not, unless the next segment is in the loss too."""
    if next_in_loss:
        return len(ids)
    end_tokens = {end_token} if end_token in ids else special
    last = [index for index, token in enumerate(ids) if token in end_tokens][-1:]
    return last[0] + 1 if last else len(ids)
