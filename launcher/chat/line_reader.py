"""Reads what the user types: a line, a line continued after a backslash, or a block in \"\"\"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import UserError

FENCE = '"""'


@dataclass(frozen=True)
class Entry:
    """One question or command. A command is a single line that starts with /."""

    text: str
    command: bool = False


def read_entry(read_line: Callable[[str], str]) -> Entry:
    """The next entry. `read_line` shows its argument as the prompt and returns one line.

    Raises EOFError, from `read_line`, at the end of the input, and UserError if the input ends
    inside a block.
    """
    first = read_line("you: ")
    if first.startswith("/"):
        return Entry(first.strip(), command=True)
    if first.lstrip().startswith(FENCE):
        return Entry(_read_block(first.lstrip().removeprefix(FENCE), read_line).strip())
    text = first
    while text.endswith("\\"):
        try:
            text = f"{text[:-1]}\n{read_line('...  ')}"
        except EOFError:
            text = text[:-1]
    return Entry(text.strip())


def _read_block(first: str, read_line: Callable[[str], str]) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(FENCE):
        try:
            lines.append(read_line("...  "))
        except EOFError:
            raise UserError(
                f"the input ended inside a block; close it with {FENCE} at the end of a line"
            ) from None
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines)
