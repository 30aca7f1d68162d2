"""What a template is given: identifiers, names, arguments and reasoning in its own dialect."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.data.template.dialect import Dialect

NAMED = Dialect(writes_ids=True, writes_names=True)
NINE = Dialect(writes_ids=True, needs_nine_characters=True)
USER = {"role": "user", "content": "q"}


def calls(*names: str, **ids: str) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "arguments": {}}}
        | ({"id": ids[name]} if name in ids else {})
        for name in names
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def result(text: str, **keys: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, **keys}


def answered(dialect: Dialect, *messages: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(content, identifier, name) of each result."""
    adapted = dialect.adapt([USER, *messages])
    return [
        (m["content"], m.get("tool_call_id"), m.get("name")) for m in adapted if m["role"] == "tool"
    ]


def test_a_result_belongs_to_the_call_that_it_names() -> None:
    one, two = calls("f1", f1="c1"), calls("f2", f2="c2")
    results = result("two", tool_call_id="c2"), result("one", tool_call_id="c1")
    expected = [("two", "c2", "f2"), ("one", "c1", "f1")]
    assert answered(NAMED, one, two, *results) == expected
    assert answered(NAMED, calls("f1", "f2", f1="c1", f2="c2"), *results) == expected


def test_a_result_without_an_identifier_belongs_to_its_name_or_its_place() -> None:
    both = calls("f1", "f2")
    by_place = answered(NAMED, both, result("one"), result("two"))
    by_name = answered(NAMED, both, result("two", name="f2"), result("one", name="f1"))
    assert by_place == [("one", "functions.f1:0", "f1"), ("two", "functions.f2:1", "f2")]
    assert by_name == by_place[::-1]


def test_an_identifier_beside_calls_without_any_belongs_to_its_place() -> None:
    made = answered(NAMED, calls("f1"), result("one", tool_call_id="call_1"))
    assert made == [("one", "functions.f1:0", "f1")]


def test_an_identifier_of_no_call_stays_as_it_is() -> None:
    assert answered(NAMED, calls("f1", f1="c1"), result("one", tool_call_id="x")) == [
        ("one", "x", None)
    ]


def test_a_template_that_writes_neither_gets_the_messages_as_they_are() -> None:
    messages = [USER, calls("f1"), result("one")]
    assert Dialect().adapt(messages) == messages


@pytest.mark.parametrize("given", ["c1", "call_abc", "abcdefgh!", ""])
def test_an_identifier_that_a_template_refuses_becomes_one_of_nine_characters(given: str) -> None:
    ids = {"f1": given} if given else {}
    keys = {"tool_call_id": given} if given else {}
    call = NINE.adapt([calls("f1", **ids)])[0]["tool_calls"][0]
    ((_, identifier, _),) = answered(NINE, calls("f1", **ids), result("one", **keys))
    assert identifier == call["id"]
    assert len(identifier) == 9
    assert identifier.isalnum()


def test_nine_letters_and_digits_stay() -> None:
    call = calls("f1", f1="abc123DEF")
    assert answered(NINE, call, result("one", tool_call_id="abc123DEF"))[0][1] == "abc123DEF"


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>R</think>A", "R", "A"),
        ("<think>\nR\n</think>\n\nA", "R", "A"),
        ("R</think>A", "R", "A"),  # behind a prompt that opens the reasoning
        ("<think></think>A", None, "A"),
    ],
)
def test_reasoning_at_the_start_of_the_content_is_moved(
    content: str, reasoning: str | None, rest: str
) -> None:
    message = {"role": "assistant", "content": content}
    (adapted,) = Dialect(separates_reasoning=True).adapt([message])
    assert (adapted.get("reasoning_content"), adapted["content"]) == (reasoning, rest)
    assert Dialect().adapt([message]) == [message]
