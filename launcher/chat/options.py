"""Generation options, and checks of options and conversations. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError

Conversation = list[dict[str, str]]  # messages with the keys role and content
ROLES = ("system", "user", "assistant")
LOWEST_TEMPERATURE = 0.01  # below it logits overflow before sampling


@dataclass(frozen=True)
class Options:
    """Options of generation. Raises UserError for a value out of its range."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None  # of each answer; None: a different seed every time

    def __post_init__(self) -> None:
        tokens, temperature, top_p, seed = (getattr(self, name) for name in NAMES)
        if not _is_integer(tokens) or not 1 <= tokens <= 10**6:
            raise UserError(f"max_new_tokens={tokens} must be an integer from 1 to 1000000")
        if not _is_number(temperature) or not (
            temperature == 0 or LOWEST_TEMPERATURE <= temperature <= 2
        ):
            raise UserError(
                f"temperature={temperature} must be 0 (greedy) or from {LOWEST_TEMPERATURE} to 2"
            )
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p} must be above 0 and at most 1")
        if seed is not None and (not _is_integer(seed) or not 0 <= seed < 2**63):
            raise UserError(f"seed={seed} must be an integer from 0 to 2^63-1, or none")

    def with_text(self, name: str, text: str) -> Options:
        """A copy with one option parsed from `text`. Raises UserError if that is not possible."""
        if name not in NAMES:
            raise UserError(f"{name} is not an option; the options are {', '.join(NAMES)}")
        is_integer = name in ("max_new_tokens", "seed")
        value: int | float | None = None
        if (name, text) != ("seed", "none"):
            try:
                value = int(text) if is_integer else float(text)
            except ValueError as error:
                kind = "an integer" if is_integer else "a number"
                raise UserError(f"{name}={text!r} is not {kind}") from error
        changes: dict[str, Any] = {name: value}
        return dataclasses.replace(self, **changes)

    def describe(self) -> str:
        """All options and their values, in one line."""
        values = {name: getattr(self, name) for name in NAMES}
        return "  ".join(f"{k} {'none' if v is None else v}" for k, v in values.items())


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def options_from_json(values: Any) -> Options:
    """Options from parsed JSON. Raises UserError for unknown options and invalid values."""
    if not isinstance(values, dict):
        raise UserError(f"options are {type(values).__name__}, expected an object")
    if unknown := sorted(map(str, values.keys() - set(NAMES))):
        raise UserError(
            f"unknown options: {', '.join(unknown)}; the options are {', '.join(NAMES)}"
        )
    return Options(**values)


def check_conversation(conversation: Any) -> Conversation:
    """Returns `conversation` unchanged. Raises UserError if it is not a list of valid messages."""
    if not isinstance(conversation, list) or not conversation:
        raise UserError("a conversation must be a list of at least one message")
    for index, message in enumerate(conversation):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {index} has no role and content")
        if message["role"] not in ROLES:
            raise UserError(
                f"message {index}: role {message['role']!r} is not one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise UserError(f"message {index}: its content is not text")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # a lone surrogate, from JSON or a pipe
            raise UserError(f"message {index} is not valid Unicode ({error.reason})") from error
    return conversation


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
