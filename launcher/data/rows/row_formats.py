"""Rows as conversations: alpaca, sharegpt, OpenAI messages, prompt and completion. Imports no
torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.data.rows import columns
from launcher.data.rows.messages import (
    REASONING_KEYS,
    Message,
    ReadMessage,
    Row,
    check_unicode,
    parse_json,
    read_message,
    read_reasoning,
    read_text,
    read_tools,
)
from launcher.data.rows.turns import (
    Turns,
    join_turns,
    message_list,
    read_message_list,
    sharegpt_spelling,
)
from launcher.errors import UserError

CONTEXT = "answers before the first question or in a prompt are read and not learned"


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)  # JSON schemas of functions
    excluded: frozenset[int] = frozenset()  # answers that their row excludes from the loss
    context: frozenset[int] = frozenset()  # answers that are only read, because of their place
    template_arguments: dict[str, Any] = field(default_factory=dict)  # of this row alone
    notes: tuple[str, ...] = ()  # what the log should say about rows like this one

    @property
    def answers(self) -> list[int]:
        """The numbers of the messages of the assistant."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def learned(self) -> list[int]:
        """The numbers of the answers in the loss."""
        return [index for index in self.answers if index not in self.excluded | self.context]


def to_conversation(location: str, row: Any, format: str, tags: dict[str, str]) -> Conversation:
    """Convert a row to a conversation with at least one answer in the loss.

    `format` is one of these, or `auto`, which recognizes the format by the fields of the row:

    alpaca: instruction, input, output, history ([[question, answer], …]).
    sharegpt: conversations ([{"from", "value"}, …]; `tags` gives other names).
    messages: messages ([{"role", "content"}, …], OpenAI's).
    completion: prompt and completion, each a text or messages.

    All have also system, tools, the reasoning of their only answer, and TRL's chat_template_kwargs.
    `location` names the row in error messages. Raises UserError if the row does not have the
    format, or has a column with a meaning that is not supported.
    """
    if not isinstance(row, dict):
        raise UserError(f"{location} is {type(row).__name__}, not an object with named fields")
    columns.refuse_unsupported(location, row)
    format = _recognize_format(location, row) if format == "auto" else format
    turns, notes = READERS[format](location, row, tags)
    turns = _with_system(location, row, turns)
    turns = _with_reasoning(location, row, format, turns)
    turns = _with_greetings_as_context(turns)
    check_unicode(location, "a column", list(row))
    conversation = Conversation(
        [turn.message for turn in turns],
        read_tools(location, row.get("tools") or row.get("functions")),
        frozenset(index for index, turn in enumerate(turns) if turn.in_loss is False),
        frozenset(index for index, turn in enumerate(turns) if turn.is_context),
        _read_template_arguments(location, row),
        (*notes, *_notes(row, format, turns)),
    )
    check_unicode(location, "the row", [conversation.messages, conversation.tools])
    if not conversation.learned:
        reason = "its answers are not in the loss" if conversation.answers else "it has no answer"
        raise UserError(
            f"{location} has nothing to train on: {reason}; add an assistant message or remove the "
            "row"
        )
    return conversation


def _with_greetings_as_context(turns: list[ReadMessage]) -> list[ReadMessage]:
    """Answers before the first question, if there is one, are read: inference writes none there."""
    roles = [turn.message["role"] for turn in turns]
    first = roles.index("user") if "user" in roles else 0
    return [
        replace(turn, is_context=True)
        if index < first and roles[index] == "assistant" and turn.in_loss is None
        else turn
        for index, turn in enumerate(turns)
    ]


def _notes(row: Row, format: str, turns: list[ReadMessage]) -> Iterator[str]:
    yield from columns.ignored(row, format)
    for key in dict.fromkeys(key for turn in turns for key in turn.ignored):
        yield f"key {key} of messages {columns.IGNORED}"
    if any(turn.is_context for turn in turns):
        yield CONTEXT


def _recognize_format(location: str, row: Row) -> str:
    format_of_field = {
        "messages": "messages",
        "conversations": "sharegpt",
        "instruction": "alpaca",
        "completion": "completion",
    }
    for name, format in format_of_field.items():
        if row.get(name) is not None:
            return format
    raise UserError(
        f"{location} has the fields {', '.join(row) or '(none)'}; needed are messages, "
        "conversations, instruction and output, or prompt and completion, by these names or with "
        "data.columns={FIELD: COLUMN}" + ("; raw text is data=pretrain" if "text" in row else "")
    )


def _read_alpaca(location: str, row: Row, tags: dict[str, str]) -> Turns:
    question = read_text(location, row, "instruction")
    if isinstance(row.get("input"), str) and not row["input"].strip():
        row = row | {"input": None}
    if row.get("input"):
        question = f"{question}\n{read_text(location, row, 'input')}"
    history = row.get("history") or []
    if not (
        isinstance(history, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    ):
        raise UserError(f"{location}: history must be pairs of question and answer")
    messages = []
    for earlier_question, answer in history:
        pair = {"question": earlier_question, "answer": answer}
        messages += _question_and_answer(f"{location} history", pair, "question", "answer")
    pair = {"question": question, "output": row.get("output")}
    messages += _question_and_answer(location, pair, "question", "output")
    return [ReadMessage(message) for message in messages], ()


def _read_sharegpt(location: str, row: Row, tags: dict[str, str]) -> Turns:
    turns = []
    for index, turn in enumerate(message_list(location, row, "conversations")):
        place, spelling = f"{location} conversations[{index}]", sharegpt_spelling(turn, tags)
        speaker = turn.get(spelling.role)
        if isinstance(speaker, str) and speaker not in spelling.roles:
            turn = turn | {spelling.role: speaker.lower()}
            if turn[spelling.role] not in spelling.roles:
                turn[spelling.role] = speaker  # as it is named in the message
        if read := read_message(place, turn, spelling):
            turns.append(read)
    return join_turns(turns, lambda turn: True)


def _read_messages(location: str, row: Row, tags: dict[str, str]) -> Turns:
    return read_message_list(location, row, "messages"), ()


def _read_completion(location: str, row: Row, tags: dict[str, str]) -> Turns:
    parts: list[list[ReadMessage]] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(name), list):
            parts.append(read_message_list(location, row, name))
        else:
            message = {"role": role, "content": read_text(location, row, name)}
            parts.append([ReadMessage(message)])
    prompt, completion = parts
    examples = [
        replace(turn, is_context=turn.message["role"] == "assistant" and turn.in_loss is None)
        for turn in prompt
    ]
    return examples + completion, ()


READERS: dict[str, Callable[[str, Row, dict[str, str]], Turns]] = {
    "alpaca": _read_alpaca,
    "sharegpt": _read_sharegpt,
    "messages": _read_messages,
    "completion": _read_completion,
}


def _with_system(location: str, row: Row, turns: list[ReadMessage]) -> list[ReadMessage]:
    """`turns` behind the system prompt of the row, if it has one."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return turns
    message = {"role": "system", "content": read_text(location, row, "system")}
    first = turns[0].message if turns else None
    if first == message:
        return turns
    if first is not None and first["role"] == "system":
        raise UserError(
            f"{location} has a column system and another system message; keep one of them"
        )
    return [ReadMessage(message), *turns]


def _with_reasoning(
    location: str, row: Row, format: str, turns: list[ReadMessage]
) -> list[ReadMessage]:
    """`turns` with the reasoning in a column of the row as that of its answer.

    In alpaca, it is that of `output`, not of the answers of `history`.
    """
    reasoning = read_reasoning(location, row)
    if reasoning is None:
        return turns
    key = next(key for key in REASONING_KEYS if row.get(key))
    answers = [turn.message for turn in turns if turn.message["role"] == "assistant"]
    answers = answers[-1:] if format == "alpaca" else answers
    if len(answers) != 1:
        raise UserError(
            f"{location} has a column {key} and {len(answers)} answers; write {key} into the "
            "message that it belongs to"
        )
    if answers[0].setdefault("reasoning_content", reasoning) != reasoning:
        raise UserError(f"{location} has a column {key} and another one in its answer; keep one")
    return turns


def _read_template_arguments(location: str, row: Row) -> dict[str, Any]:
    """TRL's column with the arguments of the chat template."""
    value = row.get("chat_template_kwargs") or {}
    value = parse_json(location, "chat_template_kwargs", value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise UserError(f"{location}: chat_template_kwargs must be an object")
    return value


def _question_and_answer(
    location: str, row: Row, question_field: str, answer_field: str
) -> list[Message]:
    return [
        {"role": "user", "content": read_text(location, row, question_field)},
        {"role": "assistant", "content": read_text(location, row, answer_field)},
    ]
