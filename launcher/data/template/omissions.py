"""Whether a chat template leaves out a part of a conversation.

A template silently leaves out what it does not know. It then renders the same text without it.
"""

from __future__ import annotations

from typing import Any

from launcher.data.rows.messages import REASONING_KEYS, Message
from launcher.data.rows.row_formats import Conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.errors import UserError

REASONING = "{} ({})".format(REASONING_KEYS[0], ", ".join(REASONING_KEYS[1:]))  # in messages


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
    key, content = template.dialect.reasoning_key, message["content"]
    calls = message.get("tool_calls", [])
    variants: list[tuple[str, Message]] = []
    # The reasoning may continue a prompt that opens it, although the template drops it.
    opens = bool(template.dialect.prefill) and message.get(key, "").strip() in answer
    if key in message and not opens:
        variants.append((REASONING, _without(message, key)))
    if calls:
        variants.append(("tool_calls", _without(message, "tool_calls")))
    if len(calls) > 1:
        variants.append(("all tool_calls but the first", {**message, "tool_calls": calls[:1]}))
    if content.strip() not in answer:
        name = f"the content of message {turn + 1}"
        others = {
            "": name,
            f"OTHER {content}": f"a part of {name}",
            f"{content} OTHER": f"a part of {name}",
        }
        variants += [(name, {**message, "content": other}) for other, name in others.items()]
    if not variants:
        return
    whole = template.render(conversation, [*before, message], location)
    for name, variant in variants:
        answered = [*before, variant]
        if _try_render(template, conversation, answered, add_generation_prompt=False) == whole:
            raise _omitted(location, name)


def check_context(
    template: ChatTemplate, conversation: Conversation, learned: list[int], text: str, location: str
) -> None:
    """Check what is before the last of the answers `learned`; `text` is the rendered conversation.

    Raises UserError if the template leaves out tools, a message of another role, or a tool call of
    an answer that is not learned.
    """
    messages = conversation.messages[: learned[-1]]
    variants: dict[str, list[Message]] = {}
    position = 0
    for index, message in enumerate(messages):
        content, name = message["content"].strip(), f"message {index + 1} ({message['role']})"
        found = text.find(content, position)
        position = found + len(content) if found >= 0 else position
        other = None
        if message["role"] == "assistant":
            if index not in learned and "tool_calls" in message:
                name, other = f"tool_calls of message {index + 1}", _without(message, "tool_calls")
        elif found < 0:
            other = {**message, "content": "OTHER"}
        if other is not None:
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
