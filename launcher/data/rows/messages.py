"""One message of a conversation, in the spellings of OpenAI, sharegpt, axolotl and ms-swift.
Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import UserError

Row = dict[str, Any]
# The input of a chat template: role and content; also name, tool_call_id, and of an assistant
# tool_calls and reasoning_content.
Message = dict[str, Any]

# "call" is a turn whose text is the JSON of tool calls.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's first format
    "tool_call": "call",  # ms-swift's
    "tool_response": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
LOSS_KEYS = ("weight", "train", "loss")  # of OpenAI, axolotl and ms-swift
KNOWN_KEYS = frozenset(
    ("name", "tool_calls", "tool_call_id", "function_call", *REASONING_KEYS, *LOSS_KEYS)
)
# Keys that change what a message means and that Shardway cannot honor.
UNSUPPORTED_KEYS = frozenset(
    (
        *("image", "images", "audio", "audios", "video", "videos", "refusal", "tools"),
        *("loss_scale", "train_detail"),
    )
)


@dataclass(frozen=True)
class ReadMessage:
    """A message, and what its row says about it."""

    message: Message
    in_loss: bool | None = None  # what weight, train or loss say; None: the row has none of them
    is_call: bool = False  # a turn whose text is the JSON of calls
    is_context: bool = False  # an answer of a prompt
    ignored: tuple[str, ...] = ()  # keys without a meaning


@dataclass(frozen=True)
class Spelling:
    """How a format names the fields and speakers of a turn."""

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)


OPENAI = Spelling()


def read_message(location: str, turn: Row, spelling: Spelling = OPENAI) -> ReadMessage | None:
    """The message of `turn`; None for an empty system prompt.

    The content may be a list of text parts, and may be missing if there are tool calls or
    reasoning. Raises UserError if the turn is not a message, or has a key that is not supported.
    """
    speaker = turn.get(spelling.role)
    role = spelling.roles.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        allowed = ", ".join(dict.fromkeys(spelling.roles))
        raise UserError(f"{location}: {spelling.role} {speaker!r} is not one of {allowed}")
    _refuse_unsupported(location, role, turn)
    text, reasoning = _read_content(location, turn, spelling.content)
    key = "function_call" if turn.get("function_call") else "tool_calls"
    calls = read_calls(location, key, turn.get(key) or [])
    if reasoning and role not in ("assistant", "call"):
        raise UserError(f"{location}: reasoning belongs to a message of the assistant")
    if is_call := role == "call":
        role, calls, text = "assistant", _parse_calls(location, spelling.content, text), ""
    if role == "system" and (text is None or (isinstance(text, str) and not text.strip())):
        return None
    message: Message = {"role": role}
    message["content"] = _checked_content(
        location, role, text, bool(calls or reasoning), spelling.content
    )
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
    if turn.get("name"):
        message["name"] = read_text(location, turn, "name")
    if identifier := _read_identifier(location, turn, "tool_call_id"):
        message["tool_call_id"] = identifier
    extra = turn.keys() - KNOWN_KEYS - {spelling.role, spelling.content}
    ignored = [key for key in turn if key in extra and turn[key] not in (None, "", [])]
    return ReadMessage(message, _is_in_loss(location, role, turn), is_call, ignored=tuple(ignored))


def read_text(location: str, row: Row, field: str) -> str:
    """The text in a field of `row`. Raises UserError if it is missing, empty or not a text."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        fault = "missing" if value is None else "empty" if isinstance(value, str) else "not a text"
        raise UserError(f"{location}: {field} is {fault}; write one or remove the row")
    check_unicode(location, field, value)
    return value


def check_unicode(location: str, field: str, value: Any) -> None:
    """Raises UserError if a text in `value`, at any depth, has half of a surrogate pair.

    JSON can contain such texts, and no tokenizer accepts them.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: {field} is not Unicode text ({error.reason})") from error
    except RecursionError as error:
        raise UserError(f"{location}: {field} is nested too deeply") from error


def read_calls(location: str, key: str, calls: Any) -> list[Any]:
    """Calls in OpenAI's format, from that format, from functions alone, or from the JSON of one.

    The arguments stay an object or the JSON text of one, as they are in the row. `key` names the
    calls in error messages.
    """
    calls = parse_json(location, key, calls) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, dict) else calls  # function_call
    if not isinstance(calls, list):
        raise UserError(f"{location}: {key} must be a list, not {type(calls).__name__}")
    return [_read_call(location, call) for call in calls]


def read_tools(location: str, tools: Any) -> list[Any]:
    """The schemas of functions in OpenAI's format, from a list, from its JSON, or from a list of
    JSON texts."""
    tools = _parsed(location, "tools", tools) or []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise UserError(f"{location}: tools must be a list of function schemas")
    tools = [_parsed(location, "tools", tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{location}: tools must be objects, the schemas of functions")
    # Templates expect OpenAI's format; sharegpt has the function alone.
    return [
        tool if "function" in tool or "type" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]


def read_reasoning(location: str, row: Row) -> str | None:
    """The reasoning in a row or turn, under the key that it has there, None if it has none."""
    found = {
        key: value
        for key in REASONING_KEYS
        if (value := row.get(key)) and not (isinstance(value, str) and not value.strip())
    }
    if not found:
        return None
    texts = {read_text(location, found, key) for key in found}
    if len(texts) > 1:
        raise UserError(f"{location}: {' and '.join(found)} differ; keep one of them")
    return texts.pop()


def parse_json(location: str, field: str, text: str) -> Any:
    """The value of a JSON text. Raises UserError if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: {field} is not JSON: {error}") from error


def _parsed(location: str, field: str, value: Any) -> Any:
    is_json = isinstance(value, str) and value.strip()
    return parse_json(location, field, value) if is_json else value or None


def _refuse_unsupported(location: str, role: str, turn: Row) -> None:
    for key in sorted(UNSUPPORTED_KEYS & turn.keys()):
        if turn[key]:
            raise UserError(
                f"{location}: {key} changes what this message means and is not supported; remove "
                "the key or the row"
            )
    if turn.get("tool_calls") and turn.get("function_call"):
        raise UserError(f"{location} has tool_calls and function_call; keep one of them")
    keys = ("tool_calls", "function_call", *(REASONING_KEYS if role != "call" else ()))
    misplaced = [key for key in keys if role != "assistant" and turn.get(key)]
    if misplaced:
        raise UserError(f"{location}: {misplaced[0]} belongs to a message of the assistant")


def _read_content(location: str, turn: Row, field: str) -> tuple[Any, str | None]:
    """The content, and the reasoning beside it or in its parts."""
    content, reasoning = turn.get(field), read_reasoning(location, turn)
    if not isinstance(content, list):
        return content, reasoning
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind == "thinking" and isinstance(part, dict):  # of Mistral's reasoning models
            thoughts.append(_read_thought(location, part.get("thinking")))
        elif kind == "text" and isinstance(text, str):
            texts.append(text)
        else:
            raise UserError(
                f"{location}: {field} has parts that are not text ({kind}); only text is supported"
            )
    thought = "".join(thoughts)
    if thought and reasoning not in (None, thought):
        raise UserError(f"{location} has reasoning in {field} and beside it; keep one of them")
    return "".join(texts), reasoning or thought or None


def _read_thought(location: str, thought: Any) -> str:
    """The text of a thinking part, which is a text or a list of text parts."""
    text, _ = _read_content(location, {"thinking part": thought}, "thinking part")
    if text is not None and not isinstance(text, str):
        raise UserError(f"{location}: a thinking part is not a text")
    return text or ""


def _checked_content(location: str, role: str, content: Any, may_be_empty: bool, field: str) -> str:
    may_be_empty = may_be_empty and role == "assistant"
    is_blank = content is None or (isinstance(content, str) and not content.strip())
    if is_blank and (role == "tool" or may_be_empty):  # a tool may return nothing
        return content or ""
    return read_text(location, {field: content}, field)


def _is_in_loss(location: str, role: str, turn: Row) -> bool | None:
    """What `weight`, `train` and `loss` say, None if there is none of them."""
    in_loss = None
    for key in LOSS_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # True and False are 1 and 0
            raise UserError(
                f"{location}: {key} {value!r} is neither 0 nor 1; an answer is in the loss or not"
            )
        if value and role != "assistant" and key != "weight":  # OpenAI's weight is of answers
            raise UserError(
                f"{location}: {key} {value!r} of a message of {role}: only answers are in the loss "
                "→ data.train_on=all for all tokens"
            )
        in_loss = bool(value) and in_loss is not False
    return in_loss


def _parse_calls(location: str, field: str, text: Any) -> list[Any]:
    """The calls in the text of a turn: JSON of one or several, with name and arguments."""
    text = read_text(location, {field: text}, field)
    return read_calls(location, field, parse_json(location, field, text))


def _read_call(location: str, call: Any) -> Any:
    call = _parsed(location, "tool_calls", call)
    function = call["function"] if isinstance(call, dict) and "function" in call else call
    function = _parsed(location, "function", function)
    if not (isinstance(function, dict) and {"name", "arguments"} <= function.keys()):
        raise UserError(f"{location}: a tool call needs a name and arguments, not {call}")
    name, arguments = read_text(location, function, "name"), function["arguments"] or {}
    if isinstance(arguments, str):
        parsed = parse_object(f"{location}: arguments of {name}", arguments)
        check_unicode(location, f"a text in the arguments of {name}", parsed)
    elif not isinstance(arguments, dict):
        raise UserError(f"{location}: arguments of {name} must be an object or its JSON text")
    function = {**function, "arguments": arguments}
    if isinstance(call, dict) and (identifier := _read_identifier(location, call, "id")):
        call = {**call, "id": identifier}
        function = {**function, "id": identifier} if "id" in function else function
    is_openai = isinstance(call, dict) and "function" in call
    return {**call, "function": function} if is_openai else _openai_call(function)


def _read_identifier(location: str, row: Row, key: str) -> str | None:
    """The identifier of a call as text; some write numbers."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return read_text(location, row, key) if value else None


def _openai_call(function: Row) -> Row:
    """A call from a function alone, whose id, if it has one, belongs to the call."""
    inner = {key: value for key, value in function.items() if key not in ("id", "type")}
    outer = {"id": function["id"]} if function.get("id") else {}
    return {**outer, "type": "function", "function": inner}


def parse_object(location: str, text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises UserError if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{location} are JSON, but not an object: {text}")
    return value
