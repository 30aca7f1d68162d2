"""A tokenizer's chat template, and the dialect of messages that it reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import date, datetime, time
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    _get_template_variables,
    render_jinja_template,
)

from launcher.data.rows.messages import Message
from launcher.data.rows.row_formats import Conversation
from launcher.data.template.dialect import Dialect, probe_dialect
from launcher.errors import UserError
from launcher.io import sandbox

# A template with {% generation %} … {% endgeneration %} marks what the assistant writes.
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOCK = "strftime_now"  # the function with which a template writes today's date
# Variables that transformers or jinja sets.
GIVEN_VARIABLES = (
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", CLOCK),
    *("namespace", "range", "dict"),
)


class ChatTemplate:
    """Renders conversations as text with a tokenizer's template.

    Messages are adapted to the dialect of the template, which is found by rendering, once. It is
    up to the caller to end a template that does not end (launcher.io.limits).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        today: str | None = None,
    ) -> None:
        """
        Args:
            arguments: Values for variables of the template, such as enable_thinking.
            today: The date that the template writes, as YYYY-MM-DD; None: that of the clock.
        """
        sandbox.install()
        self.tokenizer = tokenizer
        self.text = str(tokenizer.get_chat_template())
        self.arguments = dict(arguments or {})
        self.today = today

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return bool(GENERATION_BLOCK.search(self.text))

    @property
    def writes_date(self) -> bool:
        """Whether the template can write today's date."""
        return CLOCK in self.text

    @cached_property
    def dialect(self) -> Dialect:
        """How the template reads tool calls and reasoning, and how its turns begin and end."""
        end_token = str(self.tokenizer.eos_token or "")
        return probe_dialect(self._try_render, self.special_texts, end_token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the tokens that no text contains."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special}
        return frozenset(special | {*self.tokenizer.all_special_ids})

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens, the longest first."""
        texts = self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids))
        return tuple(sorted(texts, key=len, reverse=True))

    def adapt(self, conversation: Conversation) -> Conversation:
        """`conversation` in the dialect of the template."""
        return replace(conversation, messages=self.dialect.adapt(conversation.messages))

    def render(
        self, conversation: Conversation, messages: list[Message], location: str, **options: Any
    ) -> str:
        """The text of `messages`, which are some of `conversation`.

        Raises UserError if the template refuses them; a template is a program and may raise
        anything.
        """
        self._set_clock()
        arguments = {**self.arguments, **conversation.template_arguments, **options}
        tools = arguments.pop("tools", conversation.tools)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools or None, tokenize=False, **arguments
                )
            )
        except Exception as error:
            raise _refused(location, error) from error

    def render_marked(
        self, conversation: Conversation, messages: list[Message], location: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of `messages`, and where the template marks what the assistant writes.

        Raises UserError if the template refuses them.
        """
        self._set_clock()
        try:
            (text,), (spans,) = render_jinja_template(
                [messages],
                tools=conversation.tools or None,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
                **{**self.arguments, **conversation.template_arguments},
            )
        except Exception as error:
            raise _refused(location, error) from error
        return text, list(spans)

    @cached_property
    def readable_arguments(self) -> list[str]:
        """The variables of the template that an argument can set."""
        given = {*GIVEN_VARIABLES, *self.tokenizer.special_tokens_map}
        return sorted(_get_template_variables(self.text) - given)

    def check_arguments(self, names: Iterable[str], prefix: str) -> None:
        """Raises UserError for an argument that the template does not read; `prefix` says where it
        is."""
        unknown = sorted({*names} - {*self.readable_arguments})
        if unknown:
            raise UserError(
                f"{prefix}.{unknown[0]} is not read by the chat template; it reads "
                f"{', '.join(self.readable_arguments) or 'none'}"
            )

    def _set_clock(self) -> None:
        """Set what the template's function for today's date returns. Arguments that are functions
        do not reach a template, but transformers keeps the compiled template."""
        if self.writes_date:
            day = None if self.today is None else date.fromisoformat(self.today)
            _compile_jinja_template(self.text).globals[CLOCK] = partial(_write_date, day)

    def _try_render(
        self, messages: list[Message], tools: list[Any], add_generation_prompt: bool
    ) -> str | None:
        """The text, None if the template refuses the messages."""
        try:
            return self.render(
                Conversation(messages, tools),
                messages,
                "probe",
                add_generation_prompt=add_generation_prompt,
            )
        except UserError:
            return None


def _write_date(day: date | None, format: str) -> str:
    return (datetime.combine(day, time()) if day else datetime.now()).strftime(format)


def _refused(location: str, error: Exception) -> UserError:
    return UserError(f"{location}: the chat template refuses this row: {error}")
