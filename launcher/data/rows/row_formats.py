"""Rows as conversations: alpaca, sharegpt, OpenAI messages, prompt and completion. Imports no
torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launcher.data.rows import columns
from launcher.data.rows.messages import (
    OPENAI,
    REASONING_KEYS,
    Message,
    ReadMessage,
    Row,
    Spelling,
    check_unicode,
    parse_json,
    read_message,
    read_reasoning,
    read_text,
    read_tools,
)
from launcher.errors import UserError

# The speakers of a sharegpt turn in its dialects, in lower case, to the role of a message.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
# The keys of data.tags that name a speaker, to the role. (The other keys, role and content, name
# fields.)
TAG_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function": "call",
}
GREETING = "an answer before the first question is read and not learned"


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)  # JSON schemas of functions
    excluded: frozenset[int] = frozenset()  # answers that their row excludes from the loss
    greetings: frozenset[int] = frozenset()  # answers before the first question
    template_arguments: dict[str, Any] = field(default_factory=dict)  # of this row alone
    notes: tuple[str, ...] = ()  # what the log should say about rows like this one


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
    excluded = {index for index, turn in enumerate(turns) if turn.in_loss is False}
    greetings = _find_greetings(turns)
    keys = dict.fromkeys(key for turn in turns for key in turn.ignored)
    notes = (
        *notes,
        *columns.ignored(row, format),
        *map("key {} of messages is ignored".format, keys),
    )
    notes = (*notes, GREETING) if greetings else notes
    conversation = Conversation(
        [turn.message for turn in turns],
        read_tools(location, row.get("tools") or row.get("functions")),
        frozenset(excluded),
        frozenset(greetings),
        _read_template_arguments(location, row),
        notes,
    )
    check_unicode(location, "the row", [conversation.messages, conversation.tools])
    answers = {i for i, turn in enumerate(turns) if turn.message["role"] == "assistant"}
    if not answers - excluded:
        raise UserError(
            f"{location} has no answer to train on; add an assistant message or remove the row"
        )
    return conversation


def _find_greetings(turns: list[ReadMessage]) -> set[int]:
    """The answers before the first question, if there is one: inference does not write them."""
    roles = [turn.message["role"] for turn in turns]
    first = roles.index("user") if "user" in roles else 0
    return {i for i in range(first) if roles[i] == "assistant" and turns[i].in_loss is None}


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
        "conversations, instruction and output, or prompt and completion"
        + ("; raw text is data=pretrain" if "text" in row else "")
    )


Turns = tuple[list[ReadMessage], tuple[str, ...]]  # the messages, and notes


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
    for index, turn in enumerate(_message_list(location, row, "conversations")):
        place, spelling = f"{location} conversations[{index}]", _sharegpt_spelling(turn, tags)
        speaker = turn.get(spelling.role)
        if isinstance(speaker, str) and speaker not in spelling.roles:
            turn = turn | {spelling.role: speaker.lower()}
            if turn[spelling.role] not in spelling.roles:
                turn[spelling.role] = speaker  # as it is named in the message
        if read := read_message(place, turn, spelling):
            turns.append(read)
    return _join_turns(turns)


def _sharegpt_spelling(turn: Row, tags: dict[str, str]) -> Spelling:
    """The names that `tags` gives, otherwise from and value, or OpenAI's if the turn has these."""
    roles = SHAREGPT_ROLES | {tags[tag]: TAG_ROLES[tag] for tag in tags if tag in TAG_ROLES}
    is_openai = "from" not in turn and "role" in turn
    names = ("role", "content") if is_openai else ("from", "value")
    return Spelling(tags.get("role", names[0]), tags.get("content", names[1]), roles)


def _join_turns(turns: list[ReadMessage]) -> Turns:
    """Join neighboring turns of one speaker, which many templates refuse and none ends properly.

    A call that follows a text is one message, as in OpenAI's format.
    """
    joined: list[ReadMessage] = []
    notes: dict[str, None] = {}
    for turn in turns:
        previous = joined[-1] if joined else None
        role = turn.message["role"]
        if (
            previous is None
            or role not in ("user", "assistant")
            or previous.message["role"] != role
            or previous.in_loss != turn.in_loss
            or "reasoning_content" in turn.message
            or ("tool_calls" in previous.message and turn.message["content"])
        ):
            joined.append(turn)
            continue
        texts = [text for m in (previous, turn) if (text := m.message["content"])]
        if len(texts) > 1:
            notes[f"neighboring turns of the {role} are joined"] = None
        message = {**previous.message, "content": "\n\n".join(texts)}
        if calls := turn.message.get("tool_calls"):
            message["tool_calls"] = [*previous.message.get("tool_calls", []), *calls]
        joined[-1] = ReadMessage(message, turn.in_loss, (*previous.ignored, *turn.ignored))
    return joined, tuple(notes)


def _read_messages(location: str, row: Row, tags: dict[str, str]) -> Turns:
    return _read_message_list(location, row, "messages"), ()


def _read_message_list(location: str, row: Row, field: str) -> list[ReadMessage]:
    """OpenAI's messages. A file may name them so and write sharegpt's turns."""
    turns = []
    for index, message in enumerate(_message_list(location, row, field)):
        is_sharegpt = "role" not in message and "from" in message
        spelling = _sharegpt_spelling(message, {}) if is_sharegpt else OPENAI
        if read := read_message(f"{location} {field}[{index}]", message, spelling):
            turns.append(read)
    return turns


def _read_completion(location: str, row: Row, tags: dict[str, str]) -> Turns:
    turns: list[ReadMessage] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(name), list):
            turns += _read_message_list(location, row, name)
        else:
            turns.append(ReadMessage({"role": role, "content": read_text(location, row, name)}))
    return turns, ()


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


def _message_list(location: str, row: Row, field: str) -> list[Row]:
    messages = row.get(field)
    messages = parse_json(location, field, messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location}: {field} must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{location} {field}[{index}] is not an object")
    return messages
