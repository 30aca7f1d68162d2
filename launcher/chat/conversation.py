"""A conversation with one model, and the file it is saved to. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.chat.options import Conversation
from launcher.data.rows.row_formats import to_conversation
from launcher.errors import UserError


class ChatHistory:
    """The system prompt and the questions that were answered, with their answers."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: Conversation = []

    def with_question(self, question: str) -> Conversation:
        """The input of the model: all messages so far, and the question."""
        return [*self.messages(), {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """Append a question and its answer."""
        self.turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def messages(self) -> Conversation:
        """All messages, starting with the system prompt if there is one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]


def save(histories: Sequence[ChatHistory], file: Path) -> None:
    """Write a new file with one line of OpenAI messages per conversation. data=messages reads it.

    Raises UserError if the file exists or cannot be created, or if data=messages would reject a
    conversation.
    """
    rows = [{"messages": history.messages()} for history in histories]
    if not any(history.turns for history in histories):
        raise UserError("nothing was answered yet; there is nothing to save")
    for row in rows:
        to_conversation("the conversation", row, "messages", {})
    try:
        with file.expanduser().open("x", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise UserError(f"{file} exists and is not overwritten; choose another name") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} cannot be written: {error}") from error
