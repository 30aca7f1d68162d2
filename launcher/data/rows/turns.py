"""Lists of turns: the names of sharegpt and its dialects, and neighboring turns of one speaker.
Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from launcher.data.rows.messages import OPENAI, ReadMessage, Row, Spelling, parse_json, read_message
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

Turns = tuple[list[ReadMessage], tuple[str, ...]]  # the messages, and notes


def sharegpt_spelling(turn: Row, tags: dict[str, str]) -> Spelling:
    """The names that `tags` gives, otherwise from and value, or OpenAI's if the turn has these."""
    roles = SHAREGPT_ROLES | {tags[tag]: TAG_ROLES[tag] for tag in tags if tag in TAG_ROLES}
    is_openai = "from" not in turn and "role" in turn
    names = ("role", "content") if is_openai else ("from", "value")
    return Spelling(tags.get("role", names[0]), tags.get("content", names[1]), roles)


def join_turns(turns: list[ReadMessage], may_join: Callable[[ReadMessage], bool]) -> Turns:
    """Join neighboring turns of one speaker, which many templates refuse and none ends properly.

    A call that follows a text or a call is one message, as in OpenAI's format.
    """
    joined: list[ReadMessage] = []
    notes: dict[str, None] = {}
    for turn in turns:
        previous = joined[-1] if joined else None
        role = turn.message["role"]
        if (
            previous is None
            or not may_join(turn)
            or role not in ("user", "assistant")
            or previous.message["role"] != role
            or previous.in_loss != turn.in_loss
            or previous.message.get("name") != turn.message.get("name")
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
        ignored = (*previous.ignored, *turn.ignored)
        joined[-1] = ReadMessage(message, turn.in_loss, ignored=ignored)
    return joined, tuple(notes)


def read_message_list(location: str, row: Row, field: str) -> list[ReadMessage]:
    """OpenAI's messages. A file may name them so and write sharegpt's turns."""
    turns = []
    for index, message in enumerate(message_list(location, row, field)):
        is_sharegpt = "role" not in message and "from" in message
        spelling = sharegpt_spelling(message, {}) if is_sharegpt else OPENAI
        if read := read_message(f"{location} {field}[{index}]", message, spelling):
            turns.append(read)
    joined, _ = join_turns(turns, lambda turn: turn.is_call)
    return joined


def message_list(location: str, row: Row, field: str) -> list[Row]:
    messages = row.get(field)
    messages = parse_json(location, field, messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location}: {field} must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{location} {field}[{index}] is not an object")
    return messages
