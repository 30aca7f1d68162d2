"""Whether a chat template leaves out a part of a conversation.

A template silently leaves out what it does not know. It then renders the same text without it.
"""

from __future__ import annotations

from typing import Any

from launcher.data.rows.messages import Message
from launcher.data.rows.row_formats import Conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.errors import UserError


def check_answer(
    template: ChatTemplate,
    conversation: Conversation,
    turn: int,
    answer: str,
    location: str,
) -> None:
    """Check message number `turn`, which was rendered as `answer`.

    Raises UserError if the template leaves out its reasoning, a tool call, or the text beside them.
    """
    *before, message = conversation.messages[: turn + 1]
    key = template.dialect.reasoning_key
    calls = message.get("tool_calls", [])
    variants: dict[str, Message] = {}
    if key in message and message[key].strip() not in answer:
        variants["reasoning_content"] = _without(message, key)
    if calls:
        variants["tool_calls"] = _without(message, "tool_calls")
    if len(calls) > 1:
        variants["all tool_calls but the first"] = {**message, "tool_calls": calls[:1]}
    if message["content"].strip() not in answer:
        variants[f"the content of message {turn + 1}"] = {**message, "content": ""}
    if not variants:
        return
    whole = template.render(conversation, [*before, message], location)
    for name, variant in variants.items():
        answered = [*before, variant]
        if _try_render(template, conversation, answered, add_generation_prompt=False) == whole:
            raise _omitted(location, name)


def check_context(
    template: ChatTemplate, conversation: Conversation, last: int, text: str, location: str
) -> None:
    """Check what is before the answer number `last`; `text` is the rendered conversation.

    Raises UserError if the template leaves out tools, or a message of another role.
    """
    messages = conversation.messages[:last]
    variants: dict[str, list[Message]] = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            other = {**message, "content": "OTHER"}
            name = f"message {index + 1} ({message['role']})"
            variants[name] = [*messages[:index], other, *messages[index + 1 :]]
    if not variants and not conversation.tools:
        return
    prompt = _try_render(template, conversation, messages)
    for name, variant in variants.items():
        if prompt == _try_render(template, conversation, variant) is not None:
            raise _omitted(location, name)
    without = _try_render(template, conversation, messages, tools=[])
    if conversation.tools and prompt == without is not None:
        raise _omitted(location, "tools")


def _try_render(
    template: ChatTemplate,
    conversation: Conversation,
    messages: list[Message],
    **options: Any,
) -> str | None:
    """The prompt, None if the template refuses the messages: it requires what they lack."""
    try:
        return template.render(
            conversation, messages, "", **{"add_generation_prompt": True, **options}
        )
    except UserError:
        return None


def _omitted(location: str, name: str) -> UserError:
    return UserError(
        f"{location}: the chat template leaves out {name} → data.template=hermes, or another that "
        "writes them (docs/data.md)"
    )


def _without(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}
