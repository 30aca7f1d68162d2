"""A conversation with one model, and the file that it is kept in. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.chat.options import Conversation
from launcher.data.formats import to_conversation
from launcher.errors import UserError


class Said:
    """The system prompt and the turns that were answered."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: Conversation = []

    def asking(self, question: str) -> Conversation:
        """What the model is given: all that was said, and the question."""
        return [*self.messages(), {"role": "user", "content": question}]

    def keep(self, question: str, answer: str) -> None:
        self.turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def messages(self) -> Conversation:
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, *self.turns]


def save(conversations: Sequence[Said], file: Path) -> None:
    """One line of OpenAI messages a conversation, in a new file that data=messages reads.

    Raises UserError when the file exists or cannot be made, or a conversation would be refused
    there.
    """
    rows = [{"messages": each.messages()} for each in conversations]
    if not any(each.turns for each in conversations):
        raise UserError("nothing was answered yet; there is nothing to save")
    for row in rows:
        to_conversation("the conversation", row, "messages", {})
    try:
        with file.expanduser().open("x", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise UserError(f"{file} exists and is not written over; name another") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} cannot be written: {error}") from error
