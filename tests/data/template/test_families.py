"""Families of chat templates × kinds of rows: what is learned is what a server would ask for.

The expectation uses no code of Shardway: the prompt is what transformers renders at inference, and
the answer behind it is written by hand (tests/helpers/families.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from launcher.data.rows.row_formats import to_conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.loss_mask import tokenize_segments
from launcher.data.template.segments import render_segments
from launcher.errors import UserError
from tests.helpers import inference
from tests.helpers.families import FAMILIES
from tests.helpers.inference import Call, Family, Turn

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = Call("add", {"a": 1, "b": "ü"}, "call_0000000a1")
SECOND = Call("sub", {"a": 2, "b": "x"}, "call_0000000b2")
TEXT = Call("add", {"a": 1, "b": "ü"}, "c1", text='{"a":1,  "b":"ü"}')  # its author's spaces


@dataclass(frozen=True)
class Case:
    """A row. `features`: what a template must know to render it."""

    name: str
    turns: list[Turn]
    features: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()
    reasoning_key: str = "reasoning_content"  # or inline
    unlearned: tuple[str, Any] = ("weight", 0)
    tools_as_text: bool = False

    def row(self) -> dict[str, Any]:
        """As an author writes it."""
        row: dict[str, Any] = {"messages": [self._message(turn) for turn in self.turns]}
        if self.tools:
            row["tools"] = json.dumps(self.tools) if self.tools_as_text else list(self.tools)
        return row

    def _message(self, turn: Turn) -> dict[str, Any]:
        turn = inference.inline(turn) if self.reasoning_key == "inline" else turn
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            message[self.reasoning_key] = turn.reasoning
        if not turn.learned:
            message |= dict([self.unlearned])
        if turn.call:
            message |= {"tool_call_id": turn.call.id, "name": turn.call.name}
        if turn.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.text or call.arguments},
                }
                for call in turn.calls
            ]
        return message

    def turns_at_inference(self, family: Family) -> list[Turn]:
        """Without the system turn that is empty. Inline reasoning is mere text to a family whose
        template knows none."""
        turns = [turn for turn in self.turns if turn.role != "system" or turn.content]
        literal = self.reasoning_key == "inline" and "reasoning" in family.refuses
        return [inference.inline(turn) for turn in turns] if literal else turns


def user(text: str) -> Turn:
    return Turn("user", text)


def answer(text: str, reasoning: str = "") -> Turn:
    return Turn("assistant", text, reasoning)


def used_tool(
    *calls: Call, reasoning: str = "", result: str = "2", final: Turn | None = None
) -> list[Turn]:
    return [
        user("1 + 1?"),
        Turn("assistant", reasoning=reasoning, calls=calls),
        *(Turn("tool", result, call=call) for call in calls),
        final or answer("It is 2."),
    ]


THREE = [user("one?"), answer("ONE"), user("two?"), answer("TWO"), user("three?"), answer("THREE")]
UNLEARNED = [THREE[0], replace(THREE[1], learned=False), *THREE[2:]]
THOUGHT = [user("one?"), answer("ONE", "Hm."), user("two?"), answer("TWO", "Well, 2.")]
CASES = [
    Case("plain", THREE[:2]),
    Case("spaces", [user("one?"), answer("  ONE \n")]),
    Case("system", [Turn("system", "Be kind."), *THREE[:2]], ("system",)),
    Case("system_multi_turn", [Turn("system", "Be kind."), *THREE], ("system",)),
    Case("empty_system", [Turn("system", ""), *THREE[:2]]),
    Case("multi_turn", THREE),
    Case("tools_object", used_tool(CALL), ("tools", "calls"), (TOOL,)),
    Case("tools_text", used_tool(TEXT), ("tools", "calls"), (TOOL,), tools_as_text=True),
    Case("calls_object", used_tool(CALL), ("calls",)),
    Case("calls_text", used_tool(TEXT), ("calls",)),
    Case("calls_later_turn", [*used_tool(CALL), *THREE[:2]], ("calls",)),
    Case("parallel", used_tool(CALL, SECOND), ("calls", "parallel")),
    Case("empty_result", used_tool(CALL, result=""), ("calls",)),
    Case("reasoning_content", THOUGHT, ("reasoning",)),
    Case("thinking", THOUGHT, ("reasoning",), reasoning_key="thinking"),
    Case("reasoning", THOUGHT, ("reasoning",), reasoning_key="reasoning"),
    Case("inline", THOUGHT, ("inline",), reasoning_key="inline"),
    Case("reasoning_then_none", [*THOUGHT[:2], *THREE[2:4]], ("reasoning",)),
    Case(
        "reasoning_call_final",
        used_tool(CALL, reasoning="I add."),
        ("calls", "call reasoning"),
    ),
    Case(
        "reasoning_call_reasoning_final",
        used_tool(CALL, reasoning="I add.", final=answer("It is 2.", "So 2.")),
        ("calls", "call reasoning", "result reasoning"),
    ),
    Case("weight_0", UNLEARNED),
    Case("train_false", UNLEARNED, unlearned=("train", False)),
    Case("loss_false", UNLEARNED, unlearned=("loss", False)),
    Case("greeting", [answer("HELLO"), *THREE[:2]], ("greeting",)),
]

WITHOUT_REASONING = [
    case
    for case in CASES
    if not any("reasoning" in each or each == "inline" for each in case.features)
]
CAN_BE_PLAIN = [family for family in FAMILIES if family.plain_answer]


def learned(
    family: Family, row: dict[str, Any], **settings: Any
) -> list[tuple[list[int], list[bool]]]:
    """What Shardway makes of the row: ids and loss mask of each row of training."""
    template = template_of(family, tuple(settings.items()))
    conversation = to_conversation("row", row, "auto", {})
    tokens = tokenize_segments(template, render_segments(template, conversation, "answers", "row"))
    return [(each.ids, each.loss_mask) for each in tokens]


@lru_cache
def template_of(family: Family, settings: tuple[tuple[str, Any], ...]) -> ChatTemplate:
    return ChatTemplate(inference.tokenizer_of(family), dict(settings), today="2026-02-03")


@pytest.fixture(autouse=True)
def _fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """For templates that write the date: a test may run at midnight."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 2, 3, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_is_learned_as_at_inference_or_refused(family: Family, case: Case) -> None:
    refusals = [family.refuses[each] for each in case.features if each in family.refuses]
    if refusals:
        with pytest.raises(UserError, match="|".join(refusals)):
            learned(family, case.row())
        return
    rows = learned(family, case.row())
    turns = _with_new_ids(family, case.turns_at_inference(family), rows)
    _assert_equal(family, rows, inference.row_tokens(family, turns, list(case.tools)))


@pytest.mark.parametrize("case", WITHOUT_REASONING, ids=lambda case: case.name)
@pytest.mark.parametrize("family", CAN_BE_PLAIN, ids=lambda family: family.name)
def test_without_thinking_a_row_is_learned_as_at_inference(family: Family, case: Case) -> None:
    rows = learned(family, case.row(), enable_thinking=False)
    turns = case.turns_at_inference(family)
    expected = inference.row_tokens(family, turns, list(case.tools), enable_thinking=False)
    _assert_equal(family, rows, expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.bad_id(TEXT.id)], ids=lambda f: f.name)
def test_an_id_that_the_template_refuses_is_replaced_by_the_same_one_each_time(
    family: Family,
) -> None:
    row = Case("text", used_tool(TEXT)).row()
    assert learned(family, row) == learned(family, row)


@pytest.mark.parametrize(
    ("family", "thinking"),
    [(family, True) for family in FAMILIES] + [(family, False) for family in CAN_BE_PLAIN],
    ids=lambda each: each.name if isinstance(each, Family) else f"thinking-{each}",
)
def test_the_table_agrees_with_the_templates(family: Family, thinking: bool) -> None:
    """A finished conversation ends in the answer of the table, except for the end of a think block
    that the prompt opened and the template drops."""
    settings = {} if thinking else {"enable_thinking": False}
    ids = {CALL.id: "a00000001", SECOND.id: "b00000002", TEXT.id: "c00000003"}
    ids = {old: new for old, new in ids.items() if family.bad_id(old)}
    for case in CASES if thinking else WITHOUT_REASONING:
        if any(each in family.refuses for each in case.features):
            continue
        turns = inference.with_ids(case.turns_at_inference(family), ids)
        for turn in range(1, len(turns)):
            if turns[turn].role != "assistant":
                continue
            answer = family.answers(turns, turn, thinking)
            prompt = inference.prompt(family, turns[:turn], list(case.tools), **settings)
            whole = inference.conversation(family, turns[: turn + 1], list(case.tools), **settings)
            whole = whole.removesuffix(family.tail)
            if whole.startswith(prompt):
                end = answer.removeprefix(whole[len(prompt) :])
                assert end in ("", "<|user|>", "<|observation|>"), case.name
            else:
                assert whole.endswith(answer.split("</think>\n\n")[-1]), case.name


def _with_new_ids(family: Family, turns: list[Turn], rows: list[Any]) -> list[Turn]:
    """With the ids that Shardway made for those that the template refuses."""
    calls = {call.id: call for turn in turns for call in turn.calls if family.bad_id(call.id)}
    if not calls:
        return turns
    texts = [inference.tokenizer_of(family).decode(ids) for ids, _ in rows]
    found = dict.fromkeys(re.findall(r'"(?:call_)?id": "([A-Za-z0-9]{9})"', "".join(texts)))
    assert len(found) == len(calls), texts
    return inference.with_ids(turns, dict(zip(calls, found, strict=True)))


def _assert_equal(
    family: Family, rows: list[Any], expected: list[tuple[list[int], list[bool]]]
) -> None:
    """Ids and loss masks are equal. Behind its last learned token, a row may only have what the
    template writes there."""
    cut = []
    for ids, mask in rows:
        end = max((position + 1 for position, in_loss in enumerate(mask) if in_loss), default=0)
        cut.append((ids[:end], mask[:end]))
        rest = inference.tokenizer_of(family).decode(ids[end:])
        assert rest in ("", family.tail), f"behind the last learned token: {rest!r}"
    assert [_show(family, *row) for row in cut] == [_show(family, *row) for row in expected]
    assert cut == expected


def _show(family: Family, ids: list[int], mask: list[bool]) -> str:
    """The text, with what is learned between ⟦ and ⟧."""
    text, before = "", False
    start = 0
    for position in range(len(ids) + 1):
        now = position < len(ids) and mask[position]
        if now != before or position == len(ids):
            text += inference.tokenizer_of(family).decode(ids[start:position])
            text += "⟦" if now else "⟧" if before else ""
            start, before = position, now
    return text
