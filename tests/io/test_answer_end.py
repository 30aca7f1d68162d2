"""The tokens that end an answer are those that the rendered conversations show."""

from __future__ import annotations

import pytest

from launcher.folders import paths
from launcher.io.answer_end import end_tokens, written_end
from tests.helpers.ends import tokenizer_with

TURNS = "{% for m in messages %}"
CHATML = TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HERMES = paths.templates()["hermes"].read_text()
# As GLM: nothing follows an answer but the next turn.
NEXT_TURN = (
    TURNS + "{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "\n<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endif %}{% endfor %}"
)
# As Mistral and DeepSeek: arguments are JSON text, no content is null, and EOS ends every turn.
JSON_CALLS = (
    TURNS + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}"
    "{% elif m.content is none %}{% for c in m.tool_calls %}"
    "[CALL]{{ c.function.name + ' ' + c.function.arguments }}[/CALL]{% endfor %}[/CALLS]</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# As gpt-oss: a last answer, an earlier answer and a call end in three different tokens.
CHANNELS = (
    TURNS + "<|start|>{{ m.role }}<|message|>{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' and loop.last %}<|return|>"
    "{% else %}<|end|>{% endif %}{% endfor %}"
)
# As Llama 3.1: several calls in one turn are refused.
ONE_CALL = (
    TURNS + "{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('only one call') }}{% endif %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0].function.arguments | tojson }}</tool_call>"
    "<|eom|>{% elif m.role == 'assistant' %}<|eot|>{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)
TWO_TOKENS = TURNS + "<|{{ m.role }}|>{{ m.content }}<|stop|><|close|>{% endfor %}"
LAST_EOS = TURNS + "<|{{ m.role }}|>{{ m.content }}<|stop|>\n{% endfor %}{{ eos_token }}"
PLAIN_EOS = TURNS + "{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
NO_END = TURNS + "{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
TURN_NAMES = ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>")
CALL = ("<tool_call>", "</tool_call>")


@pytest.mark.parametrize(
    ("template", "special", "added", "expected"),
    [
        (CHATML, (), (), ["<|im_end|>"]),
        (HERMES, (), CALL, ["<|im_end|>"]),
        (NEXT_TURN, TURN_NAMES, CALL, ["<|user|>", "<|observation|>"]),
        (NEXT_TURN, (*TURN_NAMES, *CALL), (), ["<|user|>", "<|observation|>"]),
        (NEXT_TURN, (), (), []),  # the turns are plain text
        (JSON_CALLS, ("</s>", "[CALL]", "[/CALL]", "[/CALLS]", "[RESULT]"), (), ["</s>"]),
        (
            CHANNELS,
            ("<|start|>", "<|message|>", "<|call|>", "<|return|>", "<|end|>"),
            (),
            ["<|return|>", "<|call|>"],
        ),
        (ONE_CALL, ("<|eot|>", "<|eom|>"), CALL, ["<|eot|>", "<|eom|>"]),
        (ONE_CALL, (*TURN_NAMES, "<|eot|>", "<|eom|>", *CALL), (), ["<|eot|>", "<|eom|>"]),
        (SYSTEM_FIRST, (), (), ["<|im_end|>"]),
        (TWO_TOKENS, ("<|stop|>", "<|close|>"), (), ["<|stop|>"]),
        (LAST_EOS, ("<|stop|>",), (), ["<|stop|>"]),
        (PLAIN_EOS, (), (), ["<|endoftext|>"]),
        (NO_END, (), ("\n\n", "  "), []),  # Gemma's tokenizer adds runs of blanks
        (CHATML.replace("<|im_end|>", "</end>"), (), ("</end>",), ["</end>"]),
        ("{{ raise_exception('never') }}", (), (), []),
        ("no message is written", (), (), []),
    ],
)
def test_the_end_is_what_follows_an_answer_or_a_call(
    template: str, special: tuple[str, ...], added: tuple[str, ...], expected: list[str]
) -> None:
    tokenizer = tokenizer_with(template, special, added)
    assert tokenizer.convert_ids_to_tokens(list(end_tokens(tokenizer))) == expected


def test_eos_is_the_end_if_it_follows_another_token_after_every_answer() -> None:
    """Cohere ends a response with one token and the turn with EOS."""
    tokenizer = tokenizer_with(TWO_TOKENS, ("<|stop|>", "<|close|>"), eos_token="<|close|>")
    assert tokenizer.convert_ids_to_tokens(list(end_tokens(tokenizer))) == ["<|close|>"]


def test_the_unknown_token_ends_nothing_unless_it_is_eos() -> None:
    unknown = tokenizer_with(PLAIN_EOS, ("<unk>",), eos_token="<|im_end|>", unk_token="<unk>")
    unknown.chat_template = PLAIN_EOS.replace("{{ eos_token }}", "<unk>")
    assert end_tokens(unknown) == ()
    as_gpt2 = tokenizer_with(PLAIN_EOS, unk_token="<|endoftext|>")
    assert end_tokens(as_gpt2) == (as_gpt2.eos_token_id,)


def test_a_marker_of_the_vocabulary_ends_an_answer_although_it_is_not_added() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<end_of_turn>", "<0x0A>", "plain"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = TURNS + "{{ m.content }} <0x0A> plain <end_of_turn> {% endfor %}"
    assert end_tokens(tokenizer) == (1,)


def test_without_a_template_nothing_is_known() -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = None
    assert end_tokens(tokenizer) == ()


def test_the_written_end_is_not_the_next_turn() -> None:
    assert written_end(tokenizer_with(NEXT_TURN, TURN_NAMES)) is None
    assert written_end(tokenizer_with(CHATML)) == 2
