"""What the models of each family write behind their prompt: by hand, without a chat template."""

from __future__ import annotations

from collections.abc import Callable

from tests.helpers.inference import Call, Turn


def hermes(calls: tuple[Call, ...]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{c.name}", "arguments": {c.json}}}\n</tool_call>' for c in calls
    )


def parameters(call: Call, form: str) -> str:
    return "".join(form.format(name, value) for name, value in call.arguments.items())


def xml(calls: tuple[Call, ...]) -> str:
    form = "<parameter={}>\n{}\n</parameter>\n"
    return "\n".join(
        f"<tool_call>\n<function={c.name}>\n{parameters(c, form)}</function>\n</tool_call>"
        for c in calls
    )


def ending(end: str, text: Callable[[str], str] = str) -> Callable[[Turn], str]:
    return lambda turn: text(turn.content) + end


def qwen3(turn: Turn) -> str:
    return f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}{hermes(turn.calls)}<|im_end|>"


def qwen3_5(turn: Turn) -> str:
    return f"{turn.reasoning}\n</think>\n\n{qwen3_5_plain(turn)}"


def qwen3_5_plain(turn: Turn) -> str:
    return f"{turn.content.strip()}{xml(turn.calls)}<|im_end|>"


def llama3_2(turn: Turn) -> str:
    for call in turn.calls:
        return f'{{"name": "{call.name}", "parameters": {call.json}}}<|eot_id|>'
    return f"{turn.content.strip()}<|eot_id|>"


def gemma4(turn: Turn) -> str:
    calls = ""
    for call in turn.calls:
        form = {str: '{}:<|"|>{}<|"|>', int: "{}:{}"}
        parts = (form[type(v)].format(name, v) for name, v in sorted(call.arguments.items()))
        calls += f"<|tool_call>call:{call.name}{{{','.join(parts)}}}<tool_call|>"
    return f"{calls}{turn.content.strip()}<turn|>"


def mistral(turn: Turn, begin: str, id_of: Callable[[str], str]) -> str:
    if not turn.calls:
        return f"{begin}{turn.content.strip() if begin else turn.content}</s>"
    calls = ", ".join(
        f'{{"name": "{c.name}", "arguments": {c.json}, "id": "{id_of(c.id)}"}}' for c in turn.calls
    )
    return f"[TOOL_CALLS] [{calls}]</s>"


def deepseek_r1(turn: Turn) -> str:
    reasoning = f"{turn.reasoning}\n" if turn.reasoning else ""
    calls = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{c.name}\n```json\n{c.text or c.json}\n```"
        "<｜tool▁call▁end｜>"
        for c in turn.calls
    )
    calls = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""
    return f"{reasoning}</think>\n\n{turn.content}{calls}<｜end▁of▁sentence｜>"


def deepseek_v3_1(turn: Turn) -> str:
    calls = "".join(
        f"<｜tool▁call▁begin｜>{c.name}<｜tool▁sep｜>{c.text or c.json}<｜tool▁call▁end｜>"
        for c in turn.calls
    )
    calls = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""
    return f"{turn.content}{calls}<｜end▁of▁sentence｜>"


def glm(turn: Turn) -> str:
    return f"\n<think>{turn.reasoning}</think>{glm_plain(turn)}"


def glm_plain(turn: Turn) -> str:
    form = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
    text = f"\n{turn.content.strip()}" if turn.content else ""
    calls = "".join(f"\n<tool_call>{c.name}\n{parameters(c, form)}</tool_call>" for c in turn.calls)
    return text + calls + ("<|observation|>" if turn.calls else "<|user|>")


def nemotron(turn: Turn) -> str:
    content = turn.content.rstrip()
    begin = f"{turn.reasoning}\n</think>\n" if turn.reasoning else "</think>"
    if turn.calls:
        return f"{begin}{content}".rstrip() + f"\n{xml(turn.calls)}\n<|im_end|>"
    return f"{begin}{content}<|im_end|>"


def gpt_oss(turn: Turn) -> str:
    begin = "<|start|>assistant"
    analysis = f"<|channel|>analysis<|message|>{turn.reasoning}<|end|>{begin}"
    analysis = analysis if turn.reasoning else ""
    for call in turn.calls:
        to = f" to=functions.{call.name}<|channel|>commentary json"
        return f"{analysis}{to}<|message|>{call.json}<|call|>"
    return f"{analysis}<|channel|>final<|message|>{turn.content}<|return|>"


def kimi(turn: Turn) -> str:
    calls = "".join(
        f"<|tool_call_begin|>{c.id}<|tool_call_argument_begin|>{c.json}<|tool_call_end|>"
        for c in turn.calls
    )
    calls = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>" if calls else ""
    return f"<think>{turn.reasoning}</think>{turn.content}{calls}<|im_end|>"


def phi4(turn: Turn) -> str:
    calls = "".join(
        f'<|tool_call|>{{"name": "{c.name}", "arguments": {c.json}}}<|/tool_call|>'
        for c in turn.calls
    )
    return f"{turn.content}{calls}<|end|>"


def command(turn: Turn) -> str:
    end = "<|END_OF_TURN_TOKEN|>"
    if not turn.calls:
        return f"<|START_RESPONSE|>{turn.content}<|END_RESPONSE|>{end}"
    calls = ",".join(
        f'\n    {{"tool_call_id": "{n}", "tool_name": "{c.name}", "parameters": {c.json}}}'
        for n, c in enumerate(turn.calls)
    )
    thinking = f"<|START_THINKING|>{turn.reasoning}<|END_THINKING|>"
    return f"{thinking}<|START_ACTION|>[{calls}\n]<|END_ACTION|>{end}"


def lfm2(turn: Turn) -> str:
    calls = ", ".join(
        f'{{"name": "{c.name}", "arguments": {c.json}, "id": "{c.id}"}}' for c in turn.calls
    )
    calls = f"<|tool_call_start|>[{calls}]<|tool_call_end|>" if calls else ""
    return f"{calls}{turn.content}<|im_end|>"


def lfm2_5(turn: Turn) -> str:
    thinking = f"<think>{turn.reasoning}</think>" if turn.reasoning else ""
    calls = ", ".join(
        f"{c.name}({', '.join(f'{name}={value!r}' for name, value in c.arguments.items())})"
        for c in turn.calls
    )
    calls = f"<|tool_call_start|>[{calls}]<|tool_call_end|>" if calls else ""
    return f"{thinking}{turn.content}{calls}<|im_end|>"


def minimax(turn: Turn) -> str:
    begin = f"{turn.reasoning}\n</think>\n\n" if turn.reasoning else "</think>\n\n"
    form = '<parameter name="{}">{}</parameter>\n'
    calls = "".join(
        f'<invoke name="{c.name}">\n{parameters(c, form)}</invoke>\n' for c in turn.calls
    )
    calls = f"\n<minimax:tool_call>\n{calls}</minimax:tool_call>" if calls else ""
    return f"{begin}{turn.content}{calls}[e~["
