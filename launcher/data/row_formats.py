"""Rows as conversations: alpaca, sharegpt, OpenAI messages, prompt and completion. Imports no
torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from launcher.errors import UserError

Row = dict[str, Any]
Message = dict[str, Any]  # role, content; of an assistant also tool_calls, reasoning_content

ROLES = ("system", "user", "assistant", "tool")
# The speaker of a sharegpt turn, in its several dialects, to the role of a message. "function" is
# a turn with the JSON of a tool call.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "function",
}
# The keys of data.tags that name a speaker, to the role. (The other keys, role and content, name
# fields.)
TAG_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function": "function",
}


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)  # JSON schemas of functions


def to_conversation(location: str, row: Any, format: str, tags: dict[str, str]) -> Conversation:
    """Convert a row to a conversation with at least one answer.

    `format` is one of these, or `auto`, which recognizes the format by the fields of the row:

    alpaca: instruction, input, output, system, history ([[question, answer], …]).
    sharegpt: conversations ([{"from", "value"}, …]; `tags` gives other names), system, tools.
    messages: messages ([{"role", "content"}, …], OpenAI's), tools.
    completion: prompt and completion, each a text or messages.

    `location` names the row in error messages. Raises UserError if the row does not have the
    format.
    """
    if not isinstance(row, dict):
        raise UserError(f"{location} is {type(row).__name__}, not an object with named fields")
    format = _recognize_format(location, row) if format == "auto" else format
    read = READERS[format] if format != "sharegpt" else partial(_read_sharegpt, tags=tags)
    conversation = read(location, row)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise UserError(
            f"{location} has no answer to train on; add an assistant message or remove the row"
        )
    return conversation


def read_text(location: str, row: Row, field: str) -> str:
    """The text in a field of `row`. Raises UserError if it is missing, empty or not a text."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        fault = "missing" if value is None else "empty" if isinstance(value, str) else "not a text"
        raise UserError(f"{location}: {field} is {fault}; write one or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise UserError(f"{location}: {field} is not Unicode text ({error.reason})") from error
    return value


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


def _read_alpaca(location: str, row: Row) -> Conversation:
    question = read_text(location, row, "instruction")
    if isinstance(row.get("input"), str) and not row["input"].strip():
        row = row | {"input": None}
    if row.get("input"):
        question = f"{question}\n{read_text(location, row, 'input')}"
    messages = _system_message(location, row)
    history = row.get("history") or []
    if not (
        isinstance(history, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    ):
        raise UserError(f"{location}: history must be pairs of question and answer")
    for earlier_question, answer in history:
        pair = {"question": earlier_question, "answer": answer}
        messages += _question_and_answer(f"{location} history", pair, "question", "answer")
    pair = {"question": question, "output": row.get("output")}
    return Conversation([*messages, *_question_and_answer(location, pair, "question", "output")])


def _read_sharegpt(location: str, row: Row, tags: dict[str, str]) -> Conversation:
    names = {"role": "from", "content": "value"} | tags
    roles = SHAREGPT_ROLES | {names[tag]: TAG_ROLES[tag] for tag in tags if tag in TAG_ROLES}
    messages = _system_message(location, row)
    for index, turn in enumerate(_message_list(location, row, "conversations")):
        turn_location = f"{location} conversations[{index}]"
        speaker = turn.get(names["role"])
        if not isinstance(speaker, str) or speaker not in roles:
            raise UserError(
                f"{turn_location}: {names['role']} {speaker!r} is not one of {', '.join(roles)}"
            )
        role, text = roles[speaker], read_text(turn_location, turn, names["content"])
        if role == "function":
            messages.append(_tool_call_message("", _parse_function_call(turn_location, text)))
        else:
            messages.append({"role": role, "content": text})
    return Conversation(messages, _read_tools(location, row))


def _read_messages(location: str, row: Row) -> Conversation:
    messages = [
        _read_message(f"{location} messages[{index}]", message)
        for index, message in enumerate(_message_list(location, row, "messages"))
    ]
    return Conversation(messages, _read_tools(location, row))


def _read_completion(location: str, row: Row) -> Conversation:
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(name), list):
            messages += [
                _read_message(f"{location} {name}[{index}]", message)
                for index, message in enumerate(_message_list(location, row, name))
            ]
        else:
            messages.append({"role": role, "content": read_text(location, row, name)})
    return Conversation(messages, _read_tools(location, row))


READERS: dict[str, Callable[[str, Row], Conversation]] = {
    "alpaca": _read_alpaca,
    "messages": _read_messages,
    "completion": _read_completion,
}


def _read_message(location: str, message: Row) -> Message:
    """An OpenAI message. Its content may be a list of text parts, and may be missing if there are
    tool calls."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise UserError(f"{location}: role {role!r} is not one of {', '.join(ROLES)}")
    calls = _to_openai_calls(location, message.get("tool_calls") or [])
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else None for part in content)
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(content):
            raise UserError(
                f"{location}: content has parts that are not text; only text is supported"
            )
        content = "".join(texts)
    if not calls or content:
        content = read_text(location, {"content": content}, "content")
    result = (
        _tool_call_message(content or "", calls) if calls else {"role": role, "content": content}
    )
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        result["reasoning_content"] = read_text(location, {"reasoning": reasoning}, "reasoning")
    return result


def _tool_call_message(content: str, calls: list[Any]) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _parse_function_call(location: str, text: str) -> list[Any]:
    """The calls of a sharegpt function_call turn: JSON of one or several, with name and
    arguments."""
    calls = _parse_json(location, "value", text)
    return _to_openai_calls(location, calls if isinstance(calls, list) else [calls])


def _to_openai_calls(location: str, calls: Any) -> list[Any]:
    """Calls in OpenAI's format, from that format or from functions alone."""
    if not isinstance(calls, list):
        raise UserError(f"{location}: tool_calls must be a list, not {type(calls).__name__}")
    openai_calls = []
    for call in calls:
        function = call["function"] if isinstance(call, dict) and "function" in call else call
        if not (isinstance(function, dict) and {"name", "arguments"} <= function.keys()):
            raise UserError(f"{location}: a tool call needs a name and arguments, not {call}")
        read_text(location, function, "name")
        try:
            json.dumps(function["arguments"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{location}: arguments are not JSON: {error}") from error
        is_openai = function is not call
        openai_calls.append(call if is_openai else {"type": "function", "function": call})
    return openai_calls


def _read_tools(location: str, row: Row) -> list[Any]:
    """The schemas of functions, from a list or its JSON."""
    tools = row.get("tools") or []
    tools = _parse_json(location, "tools", tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list):
        raise UserError(f"{location}: tools must be a list of function schemas")
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{location}: tools must be objects, the schemas of functions")
    # Templates expect OpenAI's format; sharegpt has the function alone.
    return [
        tool if "function" in tool or "type" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]


def _system_message(location: str, row: Row) -> list[Message]:
    if not row.get("system"):
        return []
    return [{"role": "system", "content": read_text(location, row, "system")}]


def _question_and_answer(
    location: str, row: Row, question_field: str, answer_field: str
) -> list[Message]:
    return [
        {"role": "user", "content": read_text(location, row, question_field)},
        {"role": "assistant", "content": read_text(location, row, answer_field)},
    ]


def _message_list(location: str, row: Row, field: str) -> list[Row]:
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location}: {field} must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{location} {field}[{index}] is not an object")
    return messages


def _parse_json(location: str, field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: {field} is not JSON: {error}") from error
