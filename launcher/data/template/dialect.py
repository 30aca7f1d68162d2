"""What a chat template reads and writes, found by rendering short conversations with it.

Templates agree on `role` and `content` only. Some write the arguments of a tool call as JSON, some
take a mapping apart, some concatenate them as text; some write the reasoning of an answer from
`reasoning_content`, some from `thinking`; some require identifiers of calls in a form of their own.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from launcher.data.rows.messages import REASONING_KEYS, Message, parse_object

# Renders (messages, tools, add_generation_prompt); None if the template refuses them.
TryRender = Callable[[list[Message], list[Any], bool], str | None]

QUESTION, ANSWER, REASON = "QUESTION", "ANSWER", "REASON"
NAME, KEY, VALUE, RESULT = "probe_name", "probe_key", "PROBE_VALUE", "RESULT"
NINE = "abcde1234"  # an identifier that Mistral's templates accept
USER: Message = {"role": "user", "content": QUESTION}
ASSISTANT: Message = {"role": "assistant", "content": ANSWER}
FOLLOWED = [USER, ASSISTANT, USER]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {KEY: {"type": "string", "description": "A key."}},
                "required": [KEY],
            },
        },
    }
]
# <think>…</think> at the start of an answer, which some write without its first tag: the reasoning,
# and the rest.
INLINE_REASONING = re.compile(r"(?:<think>)?((?:(?!<think>).)*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Dialect:
    """How a template reads messages, and how its turns begin and end."""

    arguments_are_text: bool = False  # it concatenates them, so they must be the JSON text
    reasoning_key: str = "reasoning_content"  # the key whose text it writes
    # Reasoning at the start of the content does not stay there: the template reads a key, writes an
    # empty <think></think>, or drops it.
    separates_reasoning: bool = False
    writes_ids: bool = False  # of tool calls
    needs_nine_characters: bool = False  # it refuses shorter identifiers
    accepts_longer: bool = False  # it takes longer identifiers than nine characters
    writes_names: bool = False  # of the tool that returned a result
    header: str = ""  # begins an answer: the generation prompt as far as it stays in the text
    prefill: str = ""  # the rest of the generation prompt, such as an opened <think>
    tail: str = ""  # what it writes after a finished conversation and not between turns
    # The start of the next turn, for a template that ends no answer itself (GLM).
    end_of_answer: str = ""
    end_of_call: str = ""

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` as the template reads them."""
        adapted = [self._adapt_reasoning(message) for message in messages]
        if any("tool_calls" in message for message in messages):
            adapted = self._adapt_identifiers(adapted)
            adapted = [self._adapt_arguments(message) for message in adapted]
        return adapted

    def _adapt_reasoning(self, message: Message) -> Message:
        if self.separates_reasoning and message["role"] == "assistant":
            message = self._with_reasoning_apart(message)
        if self.reasoning_key != "reasoning_content" and "reasoning_content" in message:
            rest = {key: value for key, value in message.items() if key != "reasoning_content"}
            return {**rest, self.reasoning_key: message["reasoning_content"]}
        return message

    def _with_reasoning_apart(self, message: Message) -> Message:
        """`message` with the reasoning at the start of its content moved to a key of its own."""
        match = INLINE_REASONING.fullmatch(message["content"].lstrip())
        if match is None or {self.reasoning_key, "reasoning_content"} & message.keys():
            return message
        reasoning, content = (part.strip() for part in match.groups())
        own = {self.reasoning_key: reasoning} if reasoning else {}
        return {**message, "content": content, **own}

    def _adapt_arguments(self, message: Message) -> Message:
        calls = [
            {**call, "function": self._adapt_function(call["function"])}
            for call in message.get("tool_calls", [])
        ]
        return {**message, "tool_calls": calls} if calls else message

    def _adapt_function(self, function: dict[str, Any]) -> dict[str, Any]:
        arguments = function["arguments"]
        if isinstance(arguments, str) and not self.arguments_are_text:
            arguments = parse_object("arguments", arguments)
        elif not isinstance(arguments, str) and self.arguments_are_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**function, "arguments": arguments}

    def _adapt_identifiers(self, messages: list[Message]) -> list[Message]:
        """Give calls and results the identifiers and names that the template writes or needs."""
        adapted: list[Message] = []
        open_calls: list[_Call] = []
        count = 0
        for message in messages:
            if "tool_calls" in message:
                calls = []
                for call in message["tool_calls"]:
                    name, given = call["function"]["name"], call.get("id") or ""
                    identifier = self._identifier(given, name, count)
                    open_calls.append(_Call(given, name, identifier))
                    calls.append({**call, "id": identifier} if identifier else call)
                    count += 1
                message = {**message, "tool_calls": calls}
            elif message["role"] == "tool":
                call = _call_of(message, open_calls)
                if call is not None:
                    open_calls.remove(call)
                    message = self._with_identity(message, call)
            adapted.append(message)
        return adapted

    def _identifier(self, given: str, name: str, number: int) -> str:
        form = r".{9,}" if self.accepts_longer else r"[a-zA-Z0-9]{9}"
        if self.needs_nine_characters and not re.fullmatch(form, given):
            return xxhash.xxh3_64_hexdigest(f"{given} {name} {number}".encode())[:9]
        if self.writes_ids and not given:
            return f"functions.{name}:{number}"  # as Kimi's model card writes them
        return given

    def _with_identity(self, message: Message, call: _Call) -> Message:
        if call.identifier and (self.writes_ids or self.needs_nine_characters):
            message = {**message, "tool_call_id": call.identifier}
        return {"name": call.name, **message} if self.writes_names else message


@dataclass(frozen=True, eq=False)
class _Call:
    given: str  # identifier in the row
    name: str
    identifier: str  # as the template gets it


def _call_of(result: Message, open_calls: list[_Call]) -> _Call | None:
    """The call that a result answers: by its identifier, or by its name, or the first one without
    a result. None if no call fits."""
    given, name = result.get("tool_call_id"), result.get("name")
    if given and any(call.given for call in open_calls):
        return next((call for call in open_calls if call.given == given), None)
    named = [call for call in open_calls if call.name == name] if name else open_calls
    return next(iter(named), None)


def shared_prefix(one: str, other: str) -> int:
    """How many characters both begin with."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(other))


def probe_dialect(render: TryRender, special_texts: Sequence[str], end_token: str) -> Dialect:
    """The dialect of a template. `special_texts` are the special tokens, the longest first."""
    calls = _probe_calls(render)
    call = _call(NINE, _arguments(calls["arguments_are_text"]))
    tail = _probe_tail(render, special_texts, end_token)
    header, prefill = _probe_generation_prompt(render, tail)
    return Dialect(
        **calls,
        **_probe_reasoning(render, call),
        header=header,
        prefill=prefill,
        tail=tail,
        end_of_answer=_probe_end(render, ASSISTANT, USER, special_texts),
        end_of_call=_probe_end(render, call, _result(NINE), special_texts),
    )


def _arguments(as_text: bool) -> dict[str, str] | str:
    arguments = {KEY: VALUE}
    return json.dumps(arguments) if as_text else arguments


def _call(identifier: str, arguments: dict[str, str] | str) -> Message:
    function = {"name": NAME, "arguments": arguments}
    call = {"id": identifier, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _result(identifier: str, name: str | None = NAME) -> Message:
    named = {"name": name} if name else {}
    return {"role": "tool", "tool_call_id": identifier, "content": RESULT, **named}


def _probe_calls(render: TryRender) -> dict[str, Any]:
    def text(
        identifier: str, arguments: dict[str, str] | str, name: str | None = NAME
    ) -> str | None:
        return render([USER, _call(identifier, arguments), _result(identifier, name)], TOOLS, False)

    as_object, as_text = text(NINE, _arguments(False)), text(NINE, _arguments(True))
    # A template that concatenates raises for a mapping, or writes it as Python does.
    object_is_read = as_object is not None and VALUE in as_object and "{'" not in as_object
    text_is_read = as_text is not None and str(_arguments(True)) in as_text
    arguments = _arguments(arguments_are_text := text_is_read and not object_is_read)
    written = text(NINE, arguments)
    return {
        "arguments_are_text": arguments_are_text,
        "writes_ids": NINE in (written or ""),
        "needs_nine_characters": written is not None and text(NINE[:2], arguments) is None,
        "accepts_longer": text(NINE * 2, arguments) is not None,
        "writes_names": written is not None
        and text(NINE, arguments, name=None) not in (None, written),
    }


def _probe_reasoning(render: TryRender, call: Message) -> dict[str, Any]:
    for key in REASONING_KEYS:
        for answer, tools in ((ASSISTANT, []), (call, TOOLS)):
            if REASON in (render([USER, {**answer, key: REASON}], tools, False) or ""):
                return {"reasoning_key": key, "separates_reasoning": True}
    plain = render([USER, ASSISTANT], [], False) or ""
    inline = {**ASSISTANT, "content": f"<think>{REASON}</think>{ANSWER}"}
    dropped = REASON not in (render([USER, inline], [], False) or REASON)
    return {"separates_reasoning": dropped or "</think>" in plain}


def _probe_tail(render: TryRender, special_texts: Sequence[str], end_token: str) -> str:
    """The special tokens that end a conversation but not a turn, if the turn has an end without
    them."""
    alone, followed = render([USER, ASSISTANT], [], False), render(FOLLOWED, [], False)
    if alone is None or followed is None or followed.startswith(alone):
        return ""
    differs = shared_prefix(alone, followed)
    # The difference may begin inside of a token: both begin with <|.
    starts = [i for text in special_texts if (i := alone.rfind(text, 0, differs + len(text))) >= 0]
    end = alone.find(end_token, alone.find(ANSWER)) + len(end_token) if end_token else 0
    start = min(max(starts, default=0), end if end > len(end_token) else len(alone))
    turn = alone[:start].rstrip()
    return alone[start:] if any(turn.endswith(text) for text in special_texts) else ""


def _probe_generation_prompt(render: TryRender, tail: str) -> tuple[str, str]:
    """The generation prompt: the part that stays when the answer follows, and the rest."""
    bare, prompt = render([USER], [], False), render([USER], [], True)
    answered = render([USER, ASSISTANT], [], False)
    if bare is None or prompt is None or answered is None:
        return "", ""
    bare = bare.removesuffix(tail)
    if not prompt.startswith(bare):
        return "", ""
    whole, before = prompt[len(bare) :], answered.partition(ANSWER)[0]
    # A longer beginning contains the shorter ones.
    stays = bisect(range(1, len(whole) + 1), 0, key=lambda n: whole[:n] not in before)
    return whole[:stays], whole[stays:]


def _probe_end(
    render: TryRender, answer: Message, after: Message, special_texts: Sequence[str]
) -> str:
    """The start of the turn after `answer`, if that is what ends the answer.

    It is "" for a template that ends its answers with a special token of their own, or with none.
    """
    tools = TOOLS if "tool_calls" in answer else []
    alone, followed = (
        render([USER, answer], tools, False),
        render([USER, answer, after], tools, False),
    )
    if alone is None or followed is None or not followed.startswith(alone.rstrip()):
        return ""
    written = alone.rpartition(VALUE if "tool_calls" in answer else ANSWER)[2]
    if any(special in written for special in special_texts):
        return ""
    rest = followed[len(alone.rstrip()) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    for special in special_texts:
        if special and rest.lstrip().startswith(special):
            return space[len(alone) - len(alone.rstrip()) :] + special
    return ""
