"""Which tokens of a conversation are in the loss, for the bundled chat templates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from launcher.data.rows.row_formats import Conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.loss_mask import fit, tokenize_segments
from launcher.data.template.segments import render_segments
from launcher.errors import UserError
from launcher.folders import paths
from launcher.model.tiny import byte_tokenizer
from launcher.model.tokenizer import load_tokenizer

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "TWO"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_TOOLS = Conversation(
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    [{"type": "function", "function": {"name": "add", "parameters": {}}}],
)
SAYS_ADD = {"role": "user", "content": "please add"}  # contains the name of a tool
THINKS = (  # like Qwen3's: drops the reasoning of past answers
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{%- endif %}{{ m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
MARKED = (
    "{%- for m in messages %}{{ '[' + m.role + ']' }}{%- if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ m.content }}{%- endif %}{%- endfor %}"
)


def rows(tokenizer: Any, talk: Any, max_length: int = 1000, train_on: str = "answers") -> list[Any]:
    talk = talk if isinstance(talk, Conversation) else Conversation(talk)
    template = ChatTemplate(tokenizer)
    tokens = tokenize_segments(template, render_segments(template, talk, train_on, "row 7"))
    return [part for row in tokens for part in fit(row, max_length, "cut")]


def learned(tokens: Any, tokenizer: Any) -> str:
    ids = [i for i, t in zip(tokens.ids, tokens.loss_mask, strict=True) if t]
    return str(tokenizer.decode(ids))


def test_loss_mask_covers_each_answer_and_its_end_token_only() -> None:
    tokenizer = byte_tokenizer()
    (tokens,) = rows(tokenizer, TALK)
    assert learned(tokens, tokenizer) == "ONE<|im_end|>TWO<|im_end|>"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(tokens.ids) == whole
    assert tokens.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_train_on_last_answer_and_train_on_all() -> None:
    tokenizer = byte_tokenizer()
    (last,) = rows(tokenizer, TALK, train_on="last_answer")
    (everything,) = rows(tokenizer, TALK, train_on="all")
    (answers,) = rows(tokenizer, TALK)
    assert learned(last, tokenizer) == "TWO<|im_end|>"
    assert last.ids == everything.ids == answers.ids
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(everything, tokenizer) == whole.rstrip("\n")


def test_a_question_after_the_last_answer_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    (tokens,) = rows(tokenizer, TALK[:4])
    assert "two?" not in tokenizer.decode(tokens.ids)


def test_a_long_row_is_truncated() -> None:
    tokenizer = byte_tokenizer()
    (whole,), (cut,) = rows(tokenizer, TALK), rows(tokenizer, TALK, 50)
    assert cut.ids == whole.ids[:50]
    assert cut.loss_mask == whole.loss_mask[:50]
    assert cut.truncated
    assert not whole.truncated


def test_a_row_of_exactly_max_length_is_not_truncated() -> None:
    tokenizer = byte_tokenizer()
    (whole,) = rows(tokenizer, TALK)
    for length, truncated in ((len(whole.ids), False), (len(whole.ids) - 1, True)):
        (tokens,) = rows(tokenizer, TALK, length)
        assert tokens.ids == whole.ids[:length]
        assert tokens.truncated is truncated


def test_if_earlier_turns_are_rewritten_each_answer_is_a_row_as_at_inference() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKS
    talk = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "ONE", "reasoning_content": "hm"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "TWO", "reasoning_content": "well"},
    ]
    first, second = rows(tokenizer, talk)
    assert learned(first, tokenizer) == "<think>hm</think>ONE<|im_end|>"
    assert learned(second, tokenizer) == "<think>well</think>TWO<|im_end|>"
    prompt = tokenizer.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(second.ids).startswith(prompt)
    assert "hm" not in prompt
    (last,) = rows(tokenizer, talk, train_on="last_answer")
    assert last.ids == second.ids
    everything = rows(tokenizer, talk, train_on="all")
    assert [tokens.ids for tokens in everything] == [first.ids, second.ids]
    begin = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    assert [learned(tokens, tokenizer) for tokens in everything] == [
        f"{begin}<think>hm</think>ONE<|im_end|>",
        # The tokens shared with the first row are in the loss of that row only.
        "ONE<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
        "<think>well</think>TWO<|im_end|>",
    ]
    assert tokenizer.decode(everything[1].ids).startswith(begin)


def test_generation_tags_of_a_template_set_the_loss_mask() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = MARKED
    (tokens,) = rows(tokenizer, TALK)
    assert learned(tokens, tokenizer) == "ONE<|im_end|>TWO<|im_end|>"
    marked = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.ids == marked["input_ids"]
    assert [int(t) for t in tokens.loss_mask] == marked["assistant_masks"]


def test_a_template_that_rewrites_the_answer_itself_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match=r"row 7: .*data\.template"):
        rows(tokenizer, TALK)


@pytest.mark.parametrize("missing", ["tools", "tool_calls", "reasoning_content"])
def test_a_field_that_the_template_leaves_out_is_named(missing: str) -> None:
    tokenizer = byte_tokenizer()
    talk = {
        "tools": Conversation(TALK, WITH_TOOLS.tools),
        "tool_calls": Conversation(
            [{"role": "user", "content": "please add"}, *WITH_TOOLS.messages[1:]]
        ),
        "reasoning_content": Conversation([*TALK[:4], {**TALK[4], "reasoning_content": "hm"}]),
    }[missing]
    with pytest.raises(UserError, match=f"row 7: the chat template leaves out {missing}"):
        rows(tokenizer, talk)


def test_a_prefix_space_of_the_tokenizer_is_not_added_to_answers() -> None:
    """Like SentencePiece: the tokenizer puts a space before every input."""
    words = ["▁", "a", "b", "c", "▁a", "▁b", "▁c", "[", "]", "\n", "</s>"]
    backend = Tokenizer(
        models.BPE({w: n for n, w in enumerate(words)}, [("▁", each) for each in "abc"])
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else "
        "m.content + eos_token }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c a"}]
    (tokens,) = rows(tokenizer, talk)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == [
        "▁", "[", "a", "▁b", "]", "c", "▁a", "</s>",
    ]  # fmt: skip
    assert tokens.loss_mask == [False] * 5 + [True] * 3


def test_the_header_of_a_second_answer_in_a_row_is_not_in_the_loss() -> None:
    tokenizer = byte_tokenizer()
    talk = [*TALK[:3], {"role": "assistant", "content": "MORE"}]
    (tokens,) = rows(tokenizer, talk)
    assert learned(tokens, tokenizer) == "ONE<|im_end|>MORE<|im_end|>"


def test_text_after_the_end_of_a_turn_is_not_in_the_loss_with_any_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    (tokens,) = rows(tokenizer, TALK)
    assert learned(tokens, tokenizer) == "ONE<|im_end|>TWO<|im_end|>"


def test_a_later_system_message_is_not_dropped() -> None:
    tokenizer = byte_tokenizer()
    talk = [*TALK[:3], {"role": "system", "content": "SECRET"}, *TALK[3:]]
    for name in paths.templates():
        tokenizer.chat_template = paths.templates()[name].read_text()
        if name in ("gemma", "mistral"):
            with pytest.raises(UserError, match="a system message that is not the first"):
                rows(tokenizer, talk)
        else:
            (tokens,) = rows(tokenizer, talk)
            assert "SECRET" in tokenizer.decode(tokens.ids)


@pytest.mark.parametrize("text", ["{% if %}", "{{ raise_exception('no') }}", b"\xff", " \n"])
def test_an_invalid_template_is_refused(tiny: Path, tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "mine.jinja"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"data\.template=.*mine\.jinja (cannot|is empty)"):
        load_tokenizer(tiny, False, template=str(file))


def test_the_token_before_an_answer_is_not_its_end_token(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<|im_start|>{{ m.content + eos_token }}{% endfor %}")
    before = load_tokenizer(tiny, False).eos_token
    assert load_tokenizer(tiny, False, template=str(file)).eos_token == before != "<|im_start|>"


def test_an_error_that_a_template_raises_names_the_row() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(UserError, match=r"row 7: .*no system, please"):
        rows(tokenizer, TALK)


def test_tool_calls_are_in_the_loss_and_tool_results_are_not(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny, False, template="hermes")
    (tokens,) = rows(tokenizer, WITH_TOOLS)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert learned(tokens, tokenizer) == f"{call}<|im_end|>It is 2.<|im_end|>"
    assert "<tool_response>\n2\n</tool_response>" in tokenizer.decode(tokens.ids)


@pytest.mark.parametrize("name", paths.templates())
def test_every_bundled_template_can_be_trained_on(name: str) -> None:
    """Two turns and a system prompt, in order, with a tokenizer that has every token."""
    tokenizer = byte_tokenizer()
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*marks, "<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.chat_template = paths.templates()[name].read_text()
    (tokens,) = rows(tokenizer, [{"role": "system", "content": "Be kind."}, *TALK[1:]])
    answers = learned(tokens, tokenizer)
    assert answers.index("ONE") < answers.index("TWO")
    text = tokenizer.decode(tokens.ids)
    assert [text.count(word) for word in ("Be kind.", "one?", "two?")] == [1, 1, 1]
    assert not any(word in answers for word in ("one?", "two?", "kind"))


def test_a_template_sets_the_token_that_ends_its_answers(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(THINKS)
    assert load_tokenizer(tiny, False, template=str(file)).chat_template == THINKS
    chatml = load_tokenizer(tiny, False, template="chatml")
    assert chatml.eos_token == "<|im_end|>"
    with pytest.raises(UserError, match=r"data\.template=gemma writes <end_of_turn>, which is not"):
        load_tokenizer(tiny, False, template="gemma")


CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ ' /no_think' if switch and loop.last and m.role == 'user' else '' }}{{ '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
DROPS = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")  # as DeepSeek R1's
FOUR = [*TALK[1:]]


def with_template(text: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_a_template_that_changes_the_last_question_keeps_both_answers() -> None:
    tokenizer = with_template(CHATML.replace("switch and ", ""))
    for train_on in ("answers", "all"):
        texts = [learned(tokens, tokenizer) for tokens in rows(tokenizer, FOUR, train_on=train_on)]
        assert "ONE<|im_end|>" in texts[0]
        assert "TWO<|im_end|>" in texts[1]


@pytest.mark.parametrize(
    "content", ["x <think>R</think> a", "<think>R</think>a <think>S</think> b"]
)
def test_a_part_of_an_answer_that_a_template_drops_is_named(content: str) -> None:
    talk = [TALK[1], {"role": "assistant", "content": content}]
    with pytest.raises(UserError, match=r"leaves out (a part of the content|reasoning_content)"):
        rows(with_template(DROPS), talk)


@pytest.mark.parametrize("reasoning", ["42", "4", "433"])
def test_reasoning_that_is_also_in_the_answer_is_not_dropped(reasoning: str) -> None:
    talk = [TALK[1], {"role": "assistant", "content": "42 is it", "reasoning_content": reasoning}]
    with pytest.raises(UserError, match="leaves out reasoning_content"):
        rows(with_template(CHATML), talk)


def test_a_short_message_that_is_also_elsewhere_is_not_dropped() -> None:
    template = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    talk = [{"role": "user", "content": "You are"}, TALK[2], {"role": "system", "content": "You"}]
    with pytest.raises(UserError, match=r"leaves out message 3 \(system\)"):
        rows(with_template(template), [*talk, *TALK[3:]])


def test_a_call_of_an_answer_that_is_not_learned_is_not_dropped() -> None:
    talk = replace(WITH_TOOLS, tools=[], excluded=frozenset({1}))
    with pytest.raises(UserError, match="leaves out tool_calls of message 2"):
        rows(with_template(CHATML), talk)


def test_arguments_of_a_row_are_those_that_the_template_reads() -> None:
    tokenizer = with_template(CHATML)
    talk = Conversation(TALK[1:3], template_arguments={"switch": False})
    assert rows(tokenizer, talk)
    for name in ("swich", "add_generation_prompt", "messages", "documents"):
        with pytest.raises(UserError, match=f"chat_template_kwargs.{name} is not read"):
            rows(tokenizer, replace(talk, template_arguments={name: True}))


def test_arguments_of_a_row_come_before_those_of_the_run() -> None:
    for text in (CHATML, MARKED + "{{ '' if switch else '' }}"):
        template = ChatTemplate(with_template(text), {"switch": True})
        talk = Conversation(TALK[1:3], template_arguments={"switch": False})
        assert "no_think" not in template.render(talk, talk.messages[:1], "row 7")
        assert render_segments(template, talk, "answers", "row 7")


def test_what_two_rows_share_ends_with_a_whole_token() -> None:
    """The answer of the first row begins with <think>, and what follows in the second with <tool>:
    only < is equal."""
    template = ChatTemplate(with_template(THINKS.replace("m.content +", "'<tool>' + m.content +")))
    talk = [{**message, "reasoning_content": "r"} if message["role"] == "assistant" else message
            for message in FOUR]  # fmt: skip
    for row in render_segments(template, Conversation(talk), "all", "row 7"):
        assert not any(text.endswith("<") for text, _ in row)


def test_a_message_with_several_marks_is_learned_whole() -> None:
    """The end of a turn is a mark of its own, which is missing while a tool may still answer."""
    marked = (
        "{%- for m in messages %}{{ '[' + m.role + ']' }}{%- if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ 'CALL' if m.tool_calls }}{% endgeneration %}"
        "{%- if not m.tool_calls %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{%- elif loop.last %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}{%- endif %}"
        "{%- else %}{{ m.content }}{%- endif %}{%- endfor %}"
    )
    tokenizer = with_template(marked)
    made = rows(tokenizer, Conversation(WITH_TOOLS.messages))
    assert "".join(learned(tokens, tokenizer) for tokens in made).count("It is 2.<|im_end|>") == 1
    assert made[-1].unended == 0


def test_only_answers_may_be_excluded_where_all_tokens_are_learned() -> None:
    talk = Conversation(TALK, excluded=frozenset({1}))
    assert rows(byte_tokenizer(), talk)
    with pytest.raises(UserError, match="message 2 is not in the loss, which data"):
        rows(byte_tokenizer(), talk, train_on="all")
