"""What a person types: a line, a line that goes on after a backslash, a block between \"\"\"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import UserError

FENCE = '"""'


@dataclass(frozen=True)
class Entry:
    """Something typed. A command begins with / and is one line."""

    text: str
    command: bool = False


def read(line: Callable[[str], str]) -> Entry:
    """The next entry. `line` gives one line after showing its argument, or raises EOFError.

    Raises UserError when the input ends inside a block.
    """
    first = line("you: ")
    if first.startswith("/"):
        return Entry(first.strip(), command=True)
    if first.lstrip().startswith(FENCE):
        return Entry(_block(first.lstrip().removeprefix(FENCE), line).strip())
    text = first
    while text.endswith("\\"):
        try:
            text = f"{text[:-1]}\n{line('...  ')}"
        except EOFError:
            text = text[:-1]
    return Entry(text.strip())


def _block(begun: str, line: Callable[[str], str]) -> str:
    lines = [begun]
    while not lines[-1].rstrip().endswith(FENCE):
        try:
            lines.append(line("...  "))
        except EOFError:
            raise UserError(
                f"the input ended inside a block; close it with {FENCE} at the end of a line"
            ) from None
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines)
