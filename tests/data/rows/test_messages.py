"""Rows as other people write them: every key with a meaning is honored or refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.data.rows.row_formats import Conversation, to_conversation
from launcher.errors import UserError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SCHEMA = {"name": "w", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "w", "arguments": {"city": "Rome"}}


def parse(row: dict[str, Any], format: str = "auto", **tags: str) -> Conversation:
    return to_conversation("here", row, format, tags)


def talk(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def sharegpt(*turns: tuple[str, str], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **columns}


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_an_answer_that_its_author_excludes_is_not_in_the_loss(key: str, value: Any) -> None:
    row = talk(USER, {**ANSWER, key: value}, USER, {**ANSWER, key: 1})
    assert parse(row).excluded == {1}
    assert parse(row).messages == [USER, ANSWER, USER, ANSWER], "the key does not reach a template"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: value}]
    both = {
        "conversations": [*turns, {"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]
    }
    assert parse(both).excluded == {1}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (talk(USER, {**ANSWER, "weight": 0.5}), "weight 0.5 is neither 0 nor 1"),
        (talk(USER, {**ANSWER, "loss": "no"}), "loss 'no' is neither"),
        (talk({**USER, "train": True}, ANSWER), "train True of a message of user"),
        (talk(USER, {**ANSWER, "weight": 0}), "nothing to train on"),
        (talk(USER, {**ANSWER, "loss_scale": 2}), "loss_scale changes what this message means"),
        (talk(USER, {**ANSWER, "refusal": "no"}), "refusal changes"),
        (talk({**USER, "images": ["x.png"]}, ANSWER), "images changes"),
        (talk(USER, ANSWER, images=["x.png"]), "has images, and only text"),
        (talk(USER, ANSWER, audio="x.wav"), "has audio, and only text"),
        (talk(USER, ANSWER, videos=["x"]), "has videos, and only text"),
        (talk(USER, ANSWER, rejected="b"), "has rejected: a row for preference training"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "has chosen: a row for preference"),
        ({"prompt": "q", "completion": "a", "label": False}, "has label: a row for preference"),
        ({"prompt": "q", "completion": "a", "label": 1}, "has label"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, "has kto_tag"),
        ({"instruction": "q", "output": "a", "label": "false"}, "has label"),  # of a .csv file
        (talk(USER, ANSWER, documents=[{"text": "x"}]), "has documents .*, which is not supported"),
        (talk(USER, ANSWER, weight=0.2), "has weight 0.2, which is not supported"),
        (talk(USER, ANSWER, weight=0), "a row that is not in the loss; remove the row"),
        (talk(USER, ANSWER, USER, ANSWER, thinking="t"), "a column thinking and 2 answers"),
        (talk({"role": "system", "content": "T"}, USER, ANSWER, system="S"), "another system"),
        (talk(USER, {**ANSWER, "thinking": "x", "reasoning": "y"}), "differ; keep one"),
        (talk(USER, ANSWER, chat_template_kwargs="x"), "chat_template_kwargs is not JSON"),
        (talk(USER, {"role": "assistant", "content": None}), "content is missing"),
        (talk({**USER, "tool_calls": [CALL]}, ANSWER), "tool_calls belongs to a"),
        (talk({**USER, "thinking": "t"}, ANSWER), "thinking belongs to a message of the"),
        (talk(USER, {**ANSWER, "tool_calls": [CALL], "function_call": CALL}), "keep one of them"),
        (talk(USER, {**ANSWER, "function_call": "x"}), "function_call is not JSON"),
        (talk(USER, {**ANSWER, "tool_calls": [{**CALL, "id": [1]}]}), "id is not a text"),
        (talk(USER, ANSWER, tools=[SCHEMA], functions=[SCHEMA]), "has tools and functions"),
        (talk(USER, ANSWER, label=0), "has label"),
        (talk(USER, ANSWER, train=0), "has train 0"),
        (talk({"role": "user", "content": [{"type": "thinking", "thinking": "t"}]}, ANSWER),
         "reasoning belongs to a message of the assistant"),
        (talk(USER, {"role": "assistant", "reasoning": "x", "content": [
            {"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]}),
         "reasoning in content and beside it"),
        (talk(USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": 5}]}),
         "a thinking part is not a text"),
        (talk(USER, ANSWER, train=False), "has train False"),
        (talk(ANSWER, USER), "nothing to train on"),
        (talk(ANSWER, USER, {**ANSWER, "weight": 0}), "nothing to train on"),
        (talk({"role": "system", "content": 5}, USER, ANSWER), "content is not a text"),
        (talk(USER, {**ANSWER, "tool_calls": [{"function": {**CALL, "arguments": "[1]"}}]}),
         "arguments of w are JSON, but not an object"),
        (talk(USER, {**ANSWER, "tool_calls": [{"function": {**CALL, "arguments": "{"}}]}),
         "arguments of w are not JSON"),
        (talk(USER, {**ANSWER, "tool_calls": [{"function": {**CALL, "arguments": 1}}]}),
         "arguments of w must be an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_honored_is_refused_by_its_name(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"^here.*{sentence}"):
        parse(row)


def test_empty_columns_have_no_meaning() -> None:
    row = talk(USER, ANSWER, images=[], rejected=None, system=" ", tools="", label=None, weight=1)
    assert parse(row) == Conversation([USER, ANSWER])
    of_csv = {"instruction": "q", "output": "a", "images": "[]", "weight": "1", "label": "3"}
    assert parse(of_csv).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        talk(USER, ANSWER, system="S"),
        talk({"role": "system", "content": "S"}, USER, ANSWER, system="S"),
        {"prompt": "q", "completion": "a", "system": "S"},
        {"prompt": [USER], "completion": [ANSWER], "system": "S"},
        {"instruction": "q", "output": "a", "system": "S"},
        sharegpt(("human", "q"), ("gpt", "a"), system="S"),
    ],
)
def test_the_system_prompt_of_a_row_comes_first(row: dict[str, Any]) -> None:
    assert parse(row).messages == [{"role": "system", "content": "S"}, USER, ANSWER]


@pytest.mark.parametrize("content", ["", " \n", None, []])
def test_an_empty_system_prompt_is_none(content: Any) -> None:
    row = talk({"role": "system", "content": content}, USER, ANSWER)
    assert parse(row).messages == [USER, ANSWER]
    assert parse(sharegpt(("system", ""), ("human", "q"), ("gpt", "a"))).messages == [USER, ANSWER]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(key: str) -> None:
    expected = {**ANSWER, "reasoning_content": "t"}
    assert parse(talk(USER, {**ANSWER, key: "t"})).messages[1] == expected
    turn = {"from": "gpt", "value": "a", key: "t"}
    both = [{"from": "human", "value": "q"}, turn]
    assert parse({"conversations": both}).messages[1] == expected
    for row in (
        talk(USER, ANSWER, **{key: "t"}),
        {"instruction": "q", "output": "a", key: "t"},
        {"prompt": "q", "completion": "a", key: "t"},
    ):
        assert parse(row).messages[1] == expected
    history = {"instruction": "q", "output": "a", "history": [["x", "y"]], key: "t"}
    assert parse(history).messages[1] == {"role": "assistant", "content": "y"}
    assert parse(history).messages[3] == expected


def test_reasoning_in_a_part_of_the_content_is_reasoning() -> None:
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]
    row = talk(USER, {"role": "assistant", "content": parts})
    assert parse(row).messages[1] == {**ANSWER, "reasoning_content": "t"}
    parts[0]["thinking"] = [{"type": "text", "text": "t"}]  # as Mistral documents it
    assert parse(row).messages[1] == {**ANSWER, "reasoning_content": "t"}
    parts[0]["thinking"] = None
    assert parse(row).messages[1] == ANSWER


def test_blank_reasoning_is_none() -> None:
    assert parse(talk(USER, {**ANSWER, "reasoning": "\n", "thinking": ""})).messages[1] == ANSWER


@pytest.mark.parametrize(
    "tools",
    [
        [SCHEMA],
        [{"type": "function", "function": SCHEMA}],
        json.dumps([SCHEMA]),
        [json.dumps(SCHEMA)],
        json.dumps(SCHEMA),
    ],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_may_be_text(tools: Any, column: str) -> None:
    expected = [{"type": "function", "function": SCHEMA}]
    assert parse(talk(USER, ANSWER, **{column: tools})).tools == expected
    assert parse({"instruction": "q", "output": "a", column: tools}).tools == expected


@pytest.mark.parametrize(
    "turn",
    [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(CALL)]},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "tool_call", "content": json.dumps(CALL)},
    ],
)
def test_calls_have_several_forms(turn: dict[str, Any]) -> None:
    row = talk(USER, turn, {"role": "tool", "content": ""}, ANSWER)
    call, result = parse(row).messages[1:3]
    (found,) = call.pop("tool_calls")
    assert found["function"] == CALL
    assert call == {"role": "assistant", "content": ""}
    assert result == {"role": "tool", "content": ""}, "a tool may return nothing"


def test_calls_in_turns_of_their_own_are_parallel() -> None:
    """As ms-swift writes them."""
    turns = [{"role": "tool_call", "content": json.dumps({**CALL, "name": name})} for name in "fg"]
    results = [{"role": "tool_response", "content": text} for text in ("one", "two")]
    messages = parse(talk(USER, *turns, *results, ANSWER)).messages
    assert [message["role"] for message in messages] == [
        "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == ["f", "g"]


@pytest.mark.parametrize("blank", ["", "\n\n", " "])
def test_blank_text_beside_calls_and_blank_results_stay(blank: str) -> None:
    turn = {"role": "assistant", "content": blank, "tool_calls": [CALL]}
    messages = parse(talk(USER, turn, {"role": "tool", "content": blank}, ANSWER)).messages
    assert [message["content"] for message in messages] == ["q", blank, blank, "a"]


def test_turns_of_two_people_are_not_joined() -> None:
    turns = [{"from": "human", "value": "q", "name": name} for name in ("Ann", "Bob")]
    row = {"conversations": [*turns, {"from": "gpt", "value": "a"}]}
    assert [message.get("name") for message in parse(row).messages] == ["Ann", "Bob", None]


def test_identifiers_may_be_numbers() -> None:
    call = {"id": 7, "type": "function", "function": CALL}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = talk(USER, turn, {"role": "tool", "content": "r", "tool_call_id": 7}, ANSWER)
    messages = parse(row).messages
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "7"


def test_answers_in_a_prompt_are_examples() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "content": "b"}]}
    conversation = parse(row)
    assert (conversation.answers, conversation.learned) == ([1, 3], [3])
    row["prompt"][1] = {**ANSWER, "weight": 1}
    assert parse(row).learned == [1, 3]


def test_a_text_before_a_call_belongs_to_its_message() -> None:
    row = sharegpt(("human", "q"), ("gpt", "I look."), ("function_call", json.dumps(CALL)),
                   ("observation", "20"), ("gpt", "a"))  # fmt: skip
    messages = parse(row).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == "I look."
    assert messages[1]["tool_calls"][0]["function"] == CALL


def test_keys_of_openai_in_sharegpt_rows_are_read() -> None:
    call = {"id": "c1", "type": "function", "function": CALL}
    row = {
        "conversations": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "t"},
            {"role": "tool", "content": "20", "name": "w", "tool_call_id": "c1"},
            ANSWER,
        ]
    }
    for tags in ({}, {"role": "role", "content": "content"}):
        assert parse(row, "sharegpt", **tags).messages == row["conversations"]


@pytest.mark.parametrize(
    "name", ["chatgpt", "bing", "bard", "model", "GPT", "Assistant", "ChatGPT"]
)
def test_speakers_of_sharegpt_have_many_names(name: str) -> None:
    for human in ("human", "Human", "user", "USER"):
        assert parse(sharegpt((human, "q"), (name, "a"))).messages == [USER, ANSWER]


def test_neighboring_turns_of_one_speaker_are_joined_and_named() -> None:
    row = sharegpt(("human", "q"), ("human", "really"), ("gpt", "a"), ("gpt", "yes"))
    conversation = parse(row)
    assert conversation.messages == [
        {"role": "user", "content": "q\n\nreally"},
        {"role": "assistant", "content": "a\n\nyes"},
    ]
    assert conversation.notes == (
        "neighboring turns of the user are joined",
        "neighboring turns of the assistant are joined",
    )


def test_a_greeting_is_read_and_not_learned() -> None:
    greeting = {"role": "assistant", "content": "Hello."}
    conversation = parse(talk(greeting, USER, ANSWER))
    assert conversation.messages == [greeting, USER, ANSWER]
    assert conversation.context == {0}
    assert any("before the first question" in note for note in conversation.notes)
    assert not parse(talk({**greeting, "weight": 1}, USER, ANSWER)).context
    assert not parse(talk({"role": "system", "content": "S"}, ANSWER)).context


def test_columns_and_keys_without_a_meaning_are_named() -> None:
    row = talk({**USER, "timestamp": 3}, ANSWER, id=7, source="web", empty=None)
    assert parse(row).notes == (
        "column id is ignored",
        "column source is ignored",
        "key timestamp of messages is ignored",
    )


def test_arguments_of_the_template_may_be_a_column() -> None:
    row = talk(USER, ANSWER, chat_template_kwargs={"enable_thinking": False})
    assert parse(row).template_arguments == {"enable_thinking": False}


@pytest.mark.parametrize(
    "row",
    [
        talk(USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": {"x \ud83d": "y"}}]}),
        talk(USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": {"x": ["\udc00"]}}]}),
        talk(USER, ANSWER, tools=[{**SCHEMA, "description": "\ud800"}]),
        talk({"role": "user", "content": "q \ud83d"}, ANSWER),
        talk(USER, {**ANSWER, "reasoning": "\ud83d"}),
        {"instruction": "q", "output": "a", "system": "\ud83d"},
        {"instruction": "q", "output": "a", "\ud83d": 1},
        talk(USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": '{"a": "\\ud800"}'}]}),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_is(row: dict[str, Any]) -> None:
    row = json.loads(json.dumps(row))  # as a file contains it
    with pytest.raises(UserError, match=r"^here.* is not Unicode text"):
        parse(row)
