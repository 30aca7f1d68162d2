"""Whether a chat template leaves out a part of a conversation.

A template silently leaves out what it does not know. It then renders the same text without it.
"""

from __future__ import annotations

from launcher.data.chat_template import ChatTemplate
from launcher.data.messages import Message
from launcher.data.row_formats import Conversation
from launcher.errors import UserError


def check_answer(
    template: ChatTemplate,
    conversation: Conversation,
    turn: int,
    message: Message,
    answer: str,
    location: str,
) -> None:
    """Check the answer `message`, which is number `turn` and was rendered as `answer`.

    Raises UserError if the template leaves out its reasoning, a tool call, or the text beside them.
    """
    before = conversation.messages[:turn]
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
        if _try_render(template, conversation, [*before, variant]) == whole:
            raise _omitted(location, name)


def check_context(
    template: ChatTemplate, conversation: Conversation, text: str, location: str
) -> None:
    """Check what is not an answer; `text` is the rendered conversation.

    Raises UserError if the template leaves out tools, or a message of another role.
    """
    messages = conversation.messages
    variants: dict[str, list[Message]] = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            other = {**message, "content": "OTHER"}
            name = f"message {index + 1} ({message['role']})"
            variants[name] = [*messages[:index], other, *messages[index + 1 :]]
    if not variants and not conversation.tools:
        return
    whole = template.render(conversation, messages, location)
    for name, variant in variants.items():
        if _try_render(template, conversation, variant) == whole:
            raise _omitted(location, name)
    if conversation.tools and _try_render(template, conversation, messages, tools=[]) == whole:
        raise _omitted(location, "tools")


def _try_render(
    template: ChatTemplate,
    conversation: Conversation,
    messages: list[Message],
    **options: list[object],
) -> str | None:
    """The text, None if the template refuses the messages: it requires what they lack."""
    try:
        return template.render(conversation, messages, "", **options)
    except UserError:
        return None


def _omitted(location: str, name: str) -> UserError:
    return UserError(
        f"{location}: the chat template leaves out {name} → data.template=hermes, or another that "
        "writes them (docs/data.md)"
    )


def _without(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}
