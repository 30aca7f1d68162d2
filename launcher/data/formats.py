"""Rows as conversations: alpaca, sharegpt, OpenAI messages, prompt and completion. No torch."""

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
# Who speaks in sharegpt's turns, as its several dialects have it.
SPEAKERS = {
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
# data.tags of who speaks, beside role and content, which name the fields.
SPOKEN = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function": "function",
}


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)  # JSON schemas of functions


def to_conversation(place: str, row: Any, format: str, tags: dict[str, str]) -> Conversation:
    """A row as a conversation with an answer in it; `auto` recognises the format by its fields.

    alpaca: instruction, input, output, system, history ([[question, answer], …]).
    sharegpt: conversations ([{"from", "value"}, …], in other words by `tags`), system, tools.
    messages: messages ([{"role", "content"}, …], OpenAI's), tools.
    completion: prompt and completion, each a text or messages.
    Raises UserError that names `place` for a row that is none.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place} is {type(row).__name__}, not an object with named fields")
    format = _recognise(place, row) if format == "auto" else format
    read = READERS[format] if format != "sharegpt" else partial(_sharegpt, tags=tags)
    conversation = read(place, row)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise UserError(f"{place} has no answer to learn; add an assistant message or drop the row")
    return conversation


def text_of(place: str, row: Row, field: str) -> str:
    """A field that holds words. Raises UserError where it does not."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        what = "missing" if value is None else "empty" if isinstance(value, str) else "no text"
        raise UserError(f"{place}: {field} is {what}; write one or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates, which JSON can spell
        raise UserError(f"{place}: {field} is no Unicode text ({error.reason})") from error
    return value


def _recognise(place: str, row: Row) -> str:
    fields = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca"}
    for name, format in (fields | {"completion": "completion"}).items():
        if row.get(name) is not None:
            return format
    raise UserError(
        f"{place} has the fields {', '.join(row) or '(none)'}; needed are messages, conversations, "
        "instruction and output, or prompt and completion"
        + ("; raw text is data=pretrain" if "text" in row else "")
    )


def _alpaca(place: str, row: Row) -> Conversation:
    question = text_of(place, row, "instruction")
    if isinstance(row.get("input"), str) and not row["input"].strip():
        row = row | {"input": None}
    if row.get("input"):
        question = f"{question}\n{text_of(place, row, 'input')}"
    messages = _system(place, row)
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(t, list) and len(t) == 2 for t in history)
    if not pairs:
        raise UserError(f"{place}: history must be pairs of question and answer")
    for asked, answered in history:
        turn = {"question": asked, "answer": answered}
        messages += _exchange(f"{place} history", turn, "question", "answer")
    output = {"question": question, "output": row.get("output")}
    return Conversation([*messages, *_exchange(place, output, "question", "output")])


def _sharegpt(place: str, row: Row, tags: dict[str, str]) -> Conversation:
    names = {"role": "from", "content": "value"} | tags
    said = {names[role]: role for role in tags if role in SPOKEN}
    speakers = SPEAKERS | {word: SPOKEN[role] for word, role in said.items()}
    messages = _system(place, row)
    for index, turn in enumerate(_turns(place, row, "conversations")):
        where = f"{place} conversations[{index}]"
        speaker = turn.get(names["role"])
        if not isinstance(speaker, str) or speaker not in speakers:
            raise UserError(
                f"{where}: {names['role']} {speaker!r} is none of {', '.join(speakers)}"
            )
        role, value = speakers[speaker], text_of(where, turn, names["content"])
        if role == "function":
            messages.append(_calling("", _calls(where, value)))
        else:
            messages.append({"role": role, "content": value})
    return Conversation(messages, _tools(place, row))


def _messages(place: str, row: Row) -> Conversation:
    given = _turns(place, row, "messages")
    messages = [_message(f"{place} messages[{index}]", each) for index, each in enumerate(given)]
    return Conversation(messages, _tools(place, row))


def _completion(place: str, row: Row) -> Conversation:
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(name), list):
            given = _turns(place, row, name)
            messages += [_message(f"{place} {name}[{at}]", each) for at, each in enumerate(given)]
        else:
            messages.append({"role": role, "content": text_of(place, row, name)})
    return Conversation(messages, _tools(place, row))


READERS: dict[str, Callable[[str, Row], Conversation]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "completion": _completion,
}


def _message(where: str, message: Row) -> Message:
    """One of OpenAI's: content may be a list of text parts, and is not needed beside tool calls."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    calls = _called(where, message.get("tool_calls") or [])
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else None for part in content)
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(content):
            raise UserError(f"{where}: content has parts that are no text; only text is learnt")
        content = "".join(texts)
    if not calls or content:
        content = text_of(where, {"content": content}, "content")
    found = _calling(content or "", calls) if calls else {"role": role, "content": content}
    named = {"reasoning": message.get("reasoning_content") or message.get("reasoning")}
    if named["reasoning"]:
        found["reasoning_content"] = text_of(where, named, "reasoning")
    return found


def _calling(content: str, calls: list[Any]) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _calls(where: str, value: str) -> list[Any]:
    """sharegpt's function_call: JSON of one call or several, name and arguments."""
    calls = _json(where, "value", value)
    return _called(where, calls if isinstance(calls, list) else [calls])


def _called(where: str, calls: Any) -> list[Any]:
    """OpenAI's calls, or functions alone, as OpenAI's."""
    if not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    found = []
    for call in calls:
        inner = call["function"] if isinstance(call, dict) and "function" in call else call
        if not (isinstance(inner, dict) and {"name", "arguments"} <= inner.keys()):
            raise UserError(f"{where}: a call has a name and arguments, not {call}")
        text_of(where, inner, "name")
        try:
            json.dumps(inner["arguments"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: arguments are no JSON: {error}") from error
        found.append(call if inner is not call else {"type": "function", "function": call})
    return found


def _tools(place: str, row: Row) -> list[Any]:
    """Schemas, as a list or as the JSON of one."""
    tools = row.get("tools") or []
    tools = _json(place, "tools", tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list):
        raise UserError(f"{place}: tools must be a list of function schemas")
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: tools must be objects, the schemas of functions")
    # Templates know OpenAI's form; sharegpt has the function alone.
    return [
        tool if "function" in tool or "type" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]


def _system(place: str, row: Row) -> list[Message]:
    system = row.get("system")
    return [{"role": "system", "content": text_of(place, row, "system")}] if system else []


def _exchange(place: str, row: Row, asked: str, answered: str) -> list[Message]:
    return [
        {"role": "user", "content": text_of(place, row, asked)},
        {"role": "assistant", "content": text_of(place, row, answered)},
    ]


def _turns(place: str, row: Row, field: str) -> list[Row]:
    given = row.get(field)
    if not isinstance(given, list) or not given:
        raise UserError(f"{place}: {field} must be a list with at least one message")
    for index, turn in enumerate(given):
        if not isinstance(turn, dict):
            raise UserError(f"{place} {field}[{index}] is not an object")
    return given


def _json(place: str, field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {field} is not JSON: {error}") from error
