"""What models are given at inference and should learn, with transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[1] / "data" / "template" / "families"
MERGES = [("Ċ", "Ċ"), ("O", "N"), (":", "Ġ")]  # a text that is cut differently has other tokens


@dataclass(frozen=True)
class Call:
    """A tool call. `text`: its arguments as the author wrote them, if that was JSON text."""

    name: str
    arguments: dict[str, Any]
    id: str
    text: str | None = None

    @property
    def json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Turn:
    """A message, in no format."""

    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call: Call | None = None  # of a tool's result
    learned: bool = True


@dataclass(frozen=True, eq=False)
class Family:
    """What is known about the models that share a chat template, apart from the template."""

    name: str
    answer: Callable[[Turn], str]  # what the model writes behind its prompt, and its end token
    eos: str
    bos: str | None = None
    special: str = ""  # further special tokens
    words: str = ""  # tokens that are not special
    tail: str = ""  # what the template writes behind the last end token
    text_arguments: bool = False  # arguments reach the template as JSON text
    answer_after_result: Callable[[Turn], str] | None = None  # if its prompt is another
    plain_answer: Callable[[Turn], str] | None = None  # with enable_thinking=false
    bad_id: Callable[[str], bool] = lambda id: False
    refuses: Mapping[str, str] = field(default_factory=dict)  # feature → a part of the message

    def answers(self, turns: list[Turn], turn: int, thinking: bool = True) -> str:
        if not thinking and self.plain_answer:
            return self.plain_answer(turns[turn])
        after_result = turn and turns[turn - 1].role == "tool"
        answer = self.answer_after_result if after_result else None
        return (answer or self.answer)(turns[turn])


@cache
def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A token per byte, a few merges, and every token of the family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    ends = [token for token in (family.bos, family.eos) if token]
    backend.add_special_tokens([AddedToken(token) for token in [*ends, *family.special.split()]])
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.words.split()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=(TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8"),
    )


def prompt(family: Family, turns: list[Turn], tools: list[Any], **settings: Any) -> str:
    """The text that a server gives to the model after these turns."""
    return _render(family, turns, tools, add_generation_prompt=True, **settings)


def conversation(family: Family, turns: list[Turn], tools: list[Any], **settings: Any) -> str:
    """The text of finished turns."""
    return _render(family, turns, tools, **settings)


def _render(family: Family, turns: list[Turn], tools: list[Any], **settings: Any) -> str:
    messages = [_message(family, turn) for turn in turns]
    text = tokenizer_of(family).apply_chat_template(
        messages, tools=tools or None, tokenize=False, **settings
    )
    return str(text)


def _message(family: Family, turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning  # transformers also gives it as thinking
    if turn.call:
        message |= {"tool_call_id": turn.call.id, "name": turn.call.name}
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": (call.text or call.json)
                    if family.text_arguments
                    else call.arguments,
                },
            }
            for call in turn.calls
        ]
    return message


def row_tokens(
    family: Family,
    turns: list[Turn],
    tools: list[Any],
    **settings: Any,
) -> list[tuple[list[int], list[bool]]]:
    """The ids and loss mask of each row that should be learned.

    An answer stands behind the prompt of inference. If each prompt extends the one before and its
    answer, all are one row; otherwise each is a row of its own, which teaches only its answer.
    """
    pairs = [
        (
            prompt(family, turns[:turn], tools, **settings),
            family.answers(turns, turn, settings.get("enable_thinking", True)),
        )
        for turn, message in enumerate(turns)
        # Nothing leads to a greeting: it is only read.
        if message.role == "assistant" and turn and message.learned
    ]
    rows: list[list[tuple[str, bool]]] = [[]]
    done = ""
    for before, answer in pairs:
        if not before.startswith(done):
            rows = [[(before, False), (answer, True)] for before, answer in pairs]
            break
        rows[0] += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    return [_cut(family, row) for row in rows]


def _cut(family: Family, row: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for text, in_loss in row:
        new = tokenizer_of(family)(text, add_special_tokens=False)["input_ids"]
        ids += new
        mask += [in_loss] * len(new)
    last = max(position for position, in_loss in enumerate(mask) if in_loss)
    return ids[: last + 1], mask[: last + 1]


def inline(turn: Turn) -> Turn:
    """The reasoning as a part of the text."""
    if not turn.reasoning:
        return turn
    text = f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"
    return replace(turn, content=text, reasoning="")


def with_ids(turns: list[Turn], ids: Mapping[str, str]) -> list[Turn]:
    """The turns with other ids for their calls, where `ids` has one."""

    def other(call: Call) -> Call:
        return replace(call, id=ids.get(call.id, call.id))

    return [
        replace(turn, calls=tuple(map(other, turn.calls)), call=turn.call and other(turn.call))
        for turn in turns
    ]
