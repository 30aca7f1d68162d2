"""The tokens that end an answer, found by rendering conversations with the chat template.

Some templates end an answer with a token of its own (<|im_end|>), some with the tokenizer's EOS
token, and in some an answer ends where the next turn begins (<|user|>, <|observation|>).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launcher.io.limits import render_within_limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# Contents that are found again in the rendered text.
ANSWER, SECOND, NEXT = "shardway-answer", "shardway-second", "shardway-next"
QUESTION: Message = {"role": "user", "content": "shardway-question"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
CALL_IDS = ("lookup001", "lookup002")  # Mistral's templates require nine letters and digits
# A token of the vocabulary that marks something, although the tokenizer does not list it as added.
# SentencePiece writes bytes as <0x0A>.
MARKER = re.compile(r"<(?!0x[0-9A-F]{2}>)\S+>|\[\S+\]")


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of the tokens that end an answer of the tokenizer's chat template, each once: first
    that after a plain answer, then that after a tool call, if the template writes tool calls and it
    is another one.

    Empty without a chat template, and if no token ends the answers. A template that refuses a
    conversation of a question and an answer is asked about tool calls only. Raises UserError for a
    template that does not end.
    """
    if not tokenizer.chat_template:
        return ()

    def find() -> tuple[int, ...]:
        rendered = _Rendered(tokenizer)
        found = (rendered.after_answer(opening) for opening in _openings())
        plain = next((token for token in found if token is not None), None)
        call = rendered.after_call(plain)
        return tuple(dict.fromkeys(token for token in (plain, call) if token is not None))

    return render_within_limits(find)


def written_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template itself writes after the last answer, None if it writes none.

    Raises whatever the template raises for a question and an answer.
    """
    return render_within_limits(lambda: _Rendered(tokenizer).written_end([QUESTION]))


def _openings() -> Iterator[list[Message]]:
    """What comes before the answer. Some templates require a system message."""
    yield [QUESTION]
    yield [{"role": "system", "content": "shardway-system"}, QUESTION]


class _Rendered:
    """Conversations rendered with a tokenizer's template, and the marking tokens in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.eos: int | None = tokenizer.eos_token_id
        # GPT-2's unknown token is its EOS token.
        unknown = {tokenizer.unk_token_id} - {self.eos}
        special = {number for number, token in added.items() if token.special}
        self.special = (special | {*tokenizer.all_special_ids}) - unknown
        # Some tokenizers also add runs of blanks, which end nothing.
        visible = {number for number, token in added.items() if token.content.strip()}
        self.marking = self.special | (visible - unknown)

    def written_end(self, opening: list[Message]) -> int | None:
        """The marking token that the template writes after the last answer: the first one, or EOS
        if EOS follows it after every answer (<|END_RESPONSE|><|END_OF_TURN_TOKEN|>)."""
        marks = self._marks(_after(ANSWER, self._render([*opening, _answer()])))
        if self.eos in marks[1:] and self.eos in self._between_turns(opening):
            return self.eos
        return next(iter(marks), None)

    def after_answer(self, opening: list[Message]) -> int | None:
        """The token that the template writes after an answer, or with which the next turn
        begins."""
        try:
            end = self.written_end(opening)
        except Exception:  # a template is a program and may raise anything: it refuses these turns
            return None
        return next(iter(self._between_turns(opening)), None) if end is None else end

    def _between_turns(self, opening: list[Message]) -> list[int]:
        """The marking tokens between an answer and the content of the next turn."""
        text = self._render_or_nothing([*opening, _answer(), {"role": "user", "content": NEXT}])
        between, found, _ = _after(ANSWER, text).partition(NEXT)
        return self._marks(between) if found else []

    def after_call(self, plain: int | None) -> int | None:
        """The token after the last tool call of a turn. `plain`: that after a plain answer.

        Tokens that also stand between two calls of a turn (</tool_call>) end a call, not the turn.
        """
        for contents in ((ANSWER, SECOND), (SECOND,)):
            for call in _calls(contents):
                text = self._render_or_nothing([QUESTION, call])
                before, found, tail = text.rpartition(SECOND)
                if found:
                    between = {*self._marks(_after(ANSWER, before))}
                    return self._turn_end(call, tail, between, plain)
        return None

    def _turn_end(
        self, call: Message, tail: str, between: set[int], plain: int | None
    ) -> int | None:
        inside = self._marks(tail)
        candidates = [token for token in inside if token not in between]
        if plain in candidates:
            return plain
        if ends := [token for token in candidates if token in self.special]:
            return ends[-1]
        results = [
            {"role": "tool", "name": "look_up", "tool_call_id": each["id"], "content": NEXT}
            for each in call["tool_calls"]
        ]
        text = self._render_or_nothing([QUESTION, call, *results])
        after, found, _ = _after(SECOND, text).partition(NEXT)
        following = [token for token in self._marks(after) if token not in {*inside, *between}]
        return next(iter(following if found else candidates[-1:]), None)

    def _render_or_nothing(self, messages: list[Message]) -> str:
        try:
            return self._render(messages)
        except Exception:  # a template is a program and may raise anything: it refuses these turns
            return ""

    def _render(self, messages: list[Message]) -> str:
        calls = any("tool_calls" in message for message in messages)
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=[TOOL] if calls else None, tokenize=False
            )
        )

    def _marks(self, text: str) -> list[int]:
        """The tokens of the text that mark something, in order."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token in self.marking or self._is_marker(token)]

    def _is_marker(self, token: int) -> bool:
        text = str(self.tokenizer.convert_ids_to_tokens(token)).strip("▁Ġ")
        return token != self.tokenizer.unk_token_id and bool(MARKER.fullmatch(text))


def _after(content: str, text: str) -> str:
    """What follows the last `content` in the text, nothing if it is not there."""
    return text.rpartition(content)[2] if content in text else ""


def _answer() -> Message:
    return {"role": "assistant", "content": ANSWER}


def _calls(contents: tuple[str, ...]) -> Iterator[Message]:
    """A turn with one tool call for each of `contents`, in the forms that templates expect:
    arguments as an object or as JSON, and no text as "" or as null."""
    for as_text in (False, True):
        for content in ("", None):
            calls = [
                {
                    "id": number,
                    "type": "function",
                    "function": {
                        "name": "look_up",
                        "arguments": f'{{"word": "{word}"}}' if as_text else {"word": word},
                    },
                }
                for number, word in zip(CALL_IDS, contents, strict=False)
            ]
            yield {"role": "assistant", "content": content, "tool_calls": calls}
