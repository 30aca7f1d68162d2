"""Conversations as rows of text, split where answers begin and end."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from launcher.data.rows.row_formats import Conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.dialect import shared_prefix
from launcher.data.template.omissions import check_answer, check_context
from launcher.errors import UserError

Segment = tuple[str, bool]  # a part of a rendered conversation, and whether it is in the loss

OPEN_TAG = re.compile(r"<(\w+)>\s*$")  # a generation prompt that opens the reasoning
# At the start of an answer, which may continue a prompt that opens it.
EMPTY_REASONING = re.compile(r"\s*(<think>\s*)?</think>\s*")
MIN_CONTEXT = 4  # characters before an answer by which its place is found in a rewritten text


@dataclass(frozen=True)
class Part:
    """A part of a rendered conversation."""

    text: str
    turn: int | None = None  # the message that is the answer; None: not an answer


def render_segments(
    template: ChatTemplate,
    conversation: Conversation,
    train_on: str,
    location: str,
    learn_empty_reasoning: bool = True,
) -> list[list[Segment]]:
    """Render the conversation and split it where an answer begins and ends.

    The result is one row of segments. If the template rewrites earlier turns (for example, drops
    their reasoning), it is one row for each answer, after the prompt that the model would get at
    inference.

    Args:
        train_on: answers, last_answer or all.
        location: Names the row in error messages.
        learn_empty_reasoning: Whether an empty <think></think> before an answer is in the loss.

    Raises UserError if the template refuses the conversation, or leaves out a part of it.
    """
    learned, excluded = conversation.learned, conversation.excluded
    split = conversation.answers if train_on == "all" else learned
    if train_on == "all" and (others := excluded - {*conversation.answers}):
        raise UserError(
            f"{location}: message {min(others) + 1} is not in the loss, which data.train_on=all "
            "honors only for an answer"
        )
    template.check_arguments(conversation.template_arguments, f"{location}: chat_template_kwargs")
    conversation = template.adapt(conversation)
    rows = _join_answers(_answers(template, conversation, split, location))
    check_context(template, conversation, split, _text(rows[-1]), location)
    if not learn_empty_reasoning:
        rows = [_without_empty_reasoning(row) for row in rows]
    if train_on == "all":
        return _all_in_loss(rows, excluded)
    learned = learned[-1:] if train_on == "last_answer" else learned
    rows = [row for row in rows if any(part.turn in learned for part in row)]
    return [[(part.text, part.turn in learned) for part in row] for row in rows]


def _join_answers(answers: Iterator[list[Part]]) -> list[list[Part]]:
    """One row of all answers if each prompt continues the text before it, otherwise a row each.

    Keeps each text once while that is possible: a long conversation has many prompts.
    """
    row: list[Part] = []
    starts: list[int] = []  # the number of parts before each answer
    done = ""
    for prompt, *answer in answers:
        if not prompt.text.startswith(done):
            ends = [start - 1 for start in starts[1:]] + [len(row)]
            apart = [
                [Part(_text(row[:start])), *row[start:end]]
                for start, end in zip(starts, ends, strict=True)
            ]
            return [*apart, [prompt, *answer], *answers]
        row.append(Part(prompt.text[len(done) :]))
        starts.append(len(row))
        row += answer
        done = prompt.text + _text(answer)
    return [row]


def _text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def _answers(
    template: ChatTemplate, conversation: Conversation, turns: list[int], location: str
) -> Iterator[list[Part]]:
    """All text before an answer, and the answer, of each of `turns`."""
    split = _split_by_marks if template.marks_answers else _split_by_prompt
    for turn in turns:
        parts = split(template, conversation, turn, location)
        if parts is None:
            raise _unclear_start(template, conversation, turn, location)
        answer = _text([part for part in parts if part.turn is not None])
        check_answer(template, conversation, turn, answer, location)
        yield parts


def _unclear_start(
    template: ChatTemplate, conversation: Conversation, turn: int, location: str
) -> UserError:
    message = conversation.messages[turn]
    before = template.render(
        conversation, conversation.messages[:turn], location, add_generation_prompt=True
    )
    reasons = template.dialect.reasoning_key in message or "<think>" in message["content"]
    if reasons and before.rstrip().endswith("</think>"):
        return UserError(
            f"{location}: message {turn + 1} has reasoning, and the chat template asks for an "
            "answer without it → data.template_arguments={enable_thinking: true}, or another "
            "argument with which the template reasons"
        )
    return UserError(
        f"{location}: the chat template renders the prompt of message {turn + 1} differently once "
        "the answer follows, so it is unclear where the answer starts → data.template=NAME or "
        "FILE.jinja"
    )


def _split_by_prompt(
    template: ChatTemplate, conversation: Conversation, turn: int, location: str
) -> list[Part] | None:
    """The prompt of message number `turn`, and the text that follows it: the answer.

    None if it is unclear where the answer starts.
    """
    dialect = template.dialect
    found = _find_answer(template, conversation, turn, location)
    if found is None:
        return None
    prompt, answer = found
    calls = "tool_calls" in conversation.messages[turn]
    end = dialect.end_of_call if calls else dialect.end_of_answer
    return [Part(prompt), Part(answer + end, turn)]


def _find_answer(
    template: ChatTemplate, conversation: Conversation, turn: int, location: str
) -> tuple[str, str] | None:
    dialect = template.dialect
    *before, message = conversation.messages[: turn + 1]
    answered = template.render(conversation, [*before, message], location)
    answered = answered.removesuffix(dialect.tail)
    if any(m["role"] != "system" for m in before):
        prompt = template.render(conversation, before, location, add_generation_prompt=True)
    else:
        prompt = _prompt_of_greeting(template, conversation, turn, answered, location)
    if answered.startswith(prompt):
        return prompt, answered[len(prompt) :]
    if turn and before[-1]["role"] == "assistant":  # continues the previous answer
        earlier = template.render(conversation, before, location).removesuffix(dialect.tail)
        if answered.startswith(earlier):
            return earlier, answered[len(earlier) :]
    has_prefill = bool(dialect.prefill) and prompt.endswith(dialect.header + dialect.prefill)
    start = _start_of_answer(
        prompt.removesuffix(dialect.prefill) if has_prefill else prompt, answered, dialect.header
    )
    if start is None:
        return None
    answer = answered[start:]
    if not answer.strip():
        return None
    if has_prefill:
        answer = _continue_prefill(dialect.prefill, answer, message.get(dialect.reasoning_key))
    return prompt, answer


def _prompt_of_greeting(
    template: ChatTemplate, conversation: Conversation, turn: int, answered: str, location: str
) -> str:
    """The prompt of an answer without a question. Many templates cannot render it alone, but
    `answered` contains it."""
    before, header = conversation.messages[:turn], template.dialect.header
    with suppress(UserError):
        prompt = template.render(conversation, before, location, add_generation_prompt=True)
        if answered.startswith(prompt):
            return prompt
    start = answered.find(header) + len(header)
    if not header or start < len(header):
        raise UserError(
            f"{location}: the chat template cannot begin with an answer; add a user message before "
            "it, or remove it"
        )
    return answered[:start] + template.dialect.prefill


def _start_of_answer(prompt: str, answered: str, header: str) -> int | None:
    """Where the answer starts in `answered`, whose text before it differs from `prompt`.

    It is behind the longest end of `prompt` that `answered` contains. None if that is shorter than
    the header of an answer.
    """
    if answered.startswith(prompt):
        return len(prompt)
    # A longer end contains the shorter ones.
    length = bisect(range(1, len(prompt) + 1), 0, key=lambda n: prompt[-n:] not in answered)
    if length < max(len(header), MIN_CONTEXT):
        return None
    return answered.rindex(prompt[-length:]) + length


def _continue_prefill(prefill: str, answer: str, reasoning: str | None) -> str:
    """The answer after a generation prompt that ends with `prefill`, which the template does not
    write before a past answer.

    If it opens the reasoning (<think>), the answer closes it.
    """
    opened = OPEN_TAG.search(prefill)
    if opened is None:
        return answer
    close = f"</{opened[1]}>"
    thought = (reasoning or "").strip()
    if answer.lstrip().startswith(close):
        return thought + answer.lstrip()
    return (f"{thought}\n" if thought else "") + f"{close}\n\n" + answer


def _split_by_marks(
    template: ChatTemplate, conversation: Conversation, turn: int, location: str
) -> list[Part]:
    """The prompt of message number `turn`, and the text that the template marks as the answer.

    Raises UserError if it marks none.
    """
    messages = conversation.messages[: turn + 1]
    text, spans = template.render_marked(conversation, messages, location)
    start = _start_of_marked(template, conversation, turn, text, location)
    parts: list[Part] = []
    done = 0
    for begin, end in (span for span in spans if span[1] > max(start, span[0])):
        if done and begin == done:
            parts[-1] = Part(parts[-1].text + text[begin:end], turn)
        else:
            parts += [Part(text[done:begin]), Part(text[begin:end], turn)]
        done = end
    if not parts:
        raise UserError(
            f"{location}: the chat template marks no text of message {turn + 1} as the assistant's"
        )
    return parts


def _start_of_marked(
    template: ChatTemplate, conversation: Conversation, turn: int, text: str, location: str
) -> int:
    """A place in `text` behind which message number `turn` is, and no earlier one."""
    before = conversation.messages[:turn]
    if not any(message["role"] == "assistant" for message in before):
        return 0
    prompt = template.render(conversation, before, location, add_generation_prompt=True)
    start = _start_of_answer(prompt, text, template.dialect.header)
    if start is None:
        raise _unclear_start(template, conversation, turn, location)
    return start


def _without_empty_reasoning(row: list[Part]) -> list[Part]:
    """`row` with the empty reasoning before an answer as the end of its prompt."""
    result: list[Part] = []
    for part in row:
        match = EMPTY_REASONING.match(part.text) if part.turn is not None else None
        if match and (match[1] or result[-1].text.rstrip().endswith("<think>")):
            result[-1] = Part(result[-1].text + match[0])
            part = Part(part.text[match.end() :], part.turn)
        result.append(part)
    return result


def _all_in_loss(rows: list[list[Part]], excluded: frozenset[int]) -> list[list[Segment]]:
    """All text is in the loss, except excluded answers; text that a row shares with the row before
    it only once."""
    result: list[list[Segment]] = []
    previous = ""
    for row in rows:
        text = "".join(part.text for part in row)
        shared = _whole_words(text, shared_prefix(previous, text))
        segments: list[Segment] = []
        position = 0
        for part in row:
            old = max(0, min(len(part.text), shared - position))
            in_loss = part.turn is None or part.turn not in excluded
            segments += [(part.text[:old], False), (part.text[old:], in_loss)]
            position += len(part.text)
        result.append(_merge([segment for segment in segments if segment[0]]))
        previous = text
    return result


def _whole_words(text: str, length: int) -> int:
    """`length`, or less, such that no word and no special token of `text` is cut there."""
    if length == len(text):
        return length
    return max(text.rfind(mark, 0, length) for mark in (" ", "\n", ">")) + 1


def _merge(segments: list[Segment]) -> list[Segment]:
    """`segments` with neighbors of the same kind joined."""
    merged: list[Segment] = []
    for text, in_loss in segments:
        if merged and merged[-1][1] == in_loss:
            merged[-1] = (merged[-1][0] + text, in_loss)
        else:
            merged.append((text, in_loss))
    return merged
