"""How an answer is made, and what a conversation is. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError

Conversation = list[dict[str, str]]  # role, content
ROLES = ("system", "user", "assistant")
LOWEST_TEMPERATURE = 0.01  # below it logits overflow before anything is drawn


@dataclass(frozen=True)
class Options:
    """How an answer is made. Raises UserError for a value out of its range."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None  # of one answer; None: another one every time

    def __post_init__(self) -> None:
        tokens, temperature, top_p, seed = (getattr(self, name) for name in NAMES)
        if not _whole(tokens) or not 1 <= tokens <= 10**6:
            raise UserError(f"max_new_tokens={tokens} must be a whole number from 1 to 1000000")
        if not _number(temperature) or not (
            temperature == 0 or LOWEST_TEMPERATURE <= temperature <= 2
        ):
            raise UserError(
                f"temperature={temperature} must be 0 (greedy) or from {LOWEST_TEMPERATURE} to 2"
            )
        if not _number(top_p) or not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p} must be above 0 and at most 1")
        if seed is not None and (not _whole(seed) or not 0 <= seed < 2**63):
            raise UserError(f"seed={seed} must be a whole number from 0 to 2^63-1, or none")

    def with_text(self, name: str, text: str) -> Options:
        """With one of them read from what a person typed. Raises UserError."""
        if name not in NAMES:
            raise UserError(f"{name} is no option; there are {', '.join(NAMES)}")
        whole = name in ("max_new_tokens", "seed")
        value: Any = None
        if (name, text) != ("seed", "none"):
            try:
                value = int(text) if whole else float(text)
            except ValueError as error:
                kind = "whole number" if whole else "number"
                raise UserError(f"{name}={text!r} is no {kind}") from error
        return dataclasses.replace(self, **{name: value})

    def describe(self) -> str:
        shown = {name: getattr(self, name) for name in NAMES}
        return "  ".join(f"{k} {'none' if v is None else v}" for k, v in shown.items())


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def options_of(given: Any) -> Options:
    """Options from JSON. Raises UserError for what they are not."""
    if not isinstance(given, dict):
        raise UserError(f"options are {type(given).__name__}, expected an object")
    if strange := sorted(map(str, given.keys() - set(NAMES))):
        raise UserError(f"{', '.join(strange)} is no option; there are {', '.join(NAMES)}")
    return Options(**given)


def check(conversation: Any) -> Conversation:
    """`conversation`, after a look at every message. Raises UserError for one that is none."""
    if not isinstance(conversation, list) or not conversation:
        raise UserError("a conversation is a list of messages, and this one has none")
    for at, message in enumerate(conversation):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {at} has no role and content")
        if message["role"] not in ROLES:
            raise UserError(f"message {at}: role {message['role']!r} is none of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"message {at}: its content is no text")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # half a pair of surrogates, from JSON or a pipe
            raise UserError(f"message {at} is no Unicode text ({error.reason})") from error
    return conversation


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
