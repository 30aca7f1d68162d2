"""The families of models: what is special about each, and what it refuses.

The template of a family is tests/data/template/families/NAME.jinja.
"""

from __future__ import annotations

from tests.helpers import family_answers as answers
from tests.helpers.inference import Family

REFUSES = "the chat template refuses"
LEAVES_OUT = "leaves out"
EITHER = f"{REFUSES}|{LEAVES_OUT}"
NO_REASONING = dict.fromkeys(("reasoning", "call reasoning", "result reasoning"), LEAVES_OUT)
NO_TOOLS = dict.fromkeys(("tools", "calls"), LEAVES_OUT)
THINK = "<think> </think>"
TOOL_CALL = "<tool_call> </tool_call> <tool_response> </tool_response>"

FAMILIES = [
    Family(
        "qwen2_5",
        lambda turn: f"{turn.content}{answers.hermes(turn.calls)}<|im_end|>",
        eos="<|im_end|>",
        special="<|im_start|>",
        words=TOOL_CALL,
        tail="\n",
        refuses=NO_REASONING,
    ),
    Family(
        "qwen3",
        answers.qwen3,
        eos="<|im_end|>",
        special="<|im_start|>",
        words=THINK + " " + TOOL_CALL,
        tail="\n",
        plain_answer=lambda turn: f"{turn.content}{answers.hermes(turn.calls)}<|im_end|>",
    ),
    Family(
        "qwen3_2507",
        lambda turn: f"{turn.content}{answers.hermes(turn.calls)}<|im_end|>",
        eos="<|im_end|>",
        special="<|im_start|>",
        words=TOOL_CALL,
        tail="\n",
        refuses=NO_REASONING,
    ),
    Family(
        "qwen3_5",
        answers.qwen3_5,
        eos="<|im_end|>",
        special="<|im_start|>",
        words=THINK + " " + TOOL_CALL,
        tail="\n",
        plain_answer=answers.qwen3_5_plain,
    ),
    Family(
        "llama3",
        answers.ending("<|eot_id|>", str.strip),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        special="<|start_header_id|> <|end_header_id|>",
        refuses=NO_TOOLS | NO_REASONING,
    ),
    Family(
        "llama3_2",
        answers.llama3_2,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        special="<|start_header_id|> <|end_header_id|>",
        refuses=NO_REASONING | {"parallel": f"{REFUSES}.*single tool-calls"},
    ),
    Family(
        "gemma2",
        answers.ending("<end_of_turn>", str.strip),
        bos="<bos>",
        eos="<eos>",
        special="<start_of_turn> <end_of_turn>",
        tail="\n",
        refuses=NO_REASONING
        | {"system": f"{REFUSES}.*System role not supported", "greeting": REFUSES}
        | {"tools": EITHER, "calls": EITHER},
    ),
    Family(
        "gemma3",
        answers.ending("<end_of_turn>", str.strip),
        bos="<bos>",
        eos="<eos>",
        special="<start_of_turn> <end_of_turn>",
        tail="\n",
        refuses=NO_REASONING | {"greeting": REFUSES, "tools": EITHER, "calls": EITHER},
    ),
    Family(
        "gemma4",
        answers.gemma4,
        bos="<bos>",
        eos="<eos>",
        special=(
            "<|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> "
            '<tool_call|> <|tool_response> <tool_response|> <|"|>'
        ),
        tail="\n",
        refuses=NO_REASONING,
    ),
    Family(
        "mistral_v3",
        lambda turn: answers.mistral(turn, " ", str),
        bos="<s>",
        eos="</s>",
        special=(
            "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
            "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]"
        ),
        bad_id=lambda id: len(id) != 9,
        refuses=NO_REASONING | {"greeting": REFUSES},
    ),
    Family(
        "mistral_small_3_1",
        lambda turn: answers.mistral(turn, "", lambda id: id[-9:]),
        bos="<s>",
        eos="</s>",
        special=(
            "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
            "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"
        ),
        bad_id=lambda id: len(id) < 9,
        refuses=NO_REASONING | {"greeting": REFUSES},
    ),
    Family(
        "deepseek_r1_distill",
        answers.deepseek_r1,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        special="<｜User｜> <｜Assistant｜>",
        words=THINK + " " + "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁outputs▁end｜>",
        text_arguments=True,
        answer_after_result=answers.ending("<｜end▁of▁sentence｜>"),
        refuses={"tools": LEAVES_OUT, "result reasoning": LEAVES_OUT},
    ),
    Family(
        "deepseek_v3_1",
        answers.deepseek_v3_1,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        special="<｜User｜> <｜Assistant｜>",
        words=THINK + " " + "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜>",
        text_arguments=True,
        refuses=NO_REASONING | {"tools": LEAVES_OUT, "inline": LEAVES_OUT},
    ),
    Family(
        "glm4_5",
        answers.glm,
        eos="<|endoftext|>",
        special="[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        words=THINK + " " + TOOL_CALL,
        plain_answer=answers.glm_plain,
    ),
    Family(
        "nemotron_3",
        answers.nemotron,
        eos="<|im_end|>",
        special="<|im_start|>",
        words=THINK + " " + TOOL_CALL,
        tail="\n",
        plain_answer=lambda turn: answers.nemotron(turn).removeprefix("</think>"),
    ),
    Family(
        "gpt_oss",
        answers.gpt_oss,
        bos="<|startoftext|>",
        eos="<|return|>",
        special="<|start|> <|end|> <|message|> <|channel|> <|call|>",
        refuses={"parallel": LEAVES_OUT},
    ),
    Family(
        "kimi_k2_thinking",
        answers.kimi,
        bos="[BOS]",
        eos="[EOS]",
        special=(
            "<|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <|im_end|> "
            "<|tool_calls_section_begin|> <|tool_calls_section_end|> "
            "<|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|>"
        ),
        words=THINK,
        refuses=dict.fromkeys(("reasoning", "inline", "result reasoning"), LEAVES_OUT),
    ),
    Family(
        "phi4_mini",
        answers.phi4,
        eos="<|endoftext|>",
        special=(
            "<|system|> <|user|> <|assistant|> <|end|> <|tool_response|> <|tool|> "
            "<|/tool|> <|tool_call|> <|/tool_call|>"
        ),
        tail="<|endoftext|>",
        refuses=NO_REASONING,
    ),
    Family(
        "command_r7b",
        answers.command,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        special=(
            "<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> "
            "<|CHATBOT_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_ACTION|> "
            "<|END_ACTION|> <|START_THINKING|> <|END_THINKING|>"
        ),
        tail="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        refuses=dict.fromkeys(("reasoning", "inline", "result reasoning"), LEAVES_OUT),
    ),
    Family(
        "lfm2",
        answers.lfm2,
        bos="<|startoftext|>",
        eos="<|im_end|>",
        special=(
            "<|im_start|> <|tool_call_start|> <|tool_call_end|> <|tool_list_start|> "
            "<|tool_list_end|> <|tool_response_start|> <|tool_response_end|>"
        ),
        tail="\n",
        refuses=NO_REASONING,
    ),
    Family(
        "lfm2_5",
        answers.lfm2_5,
        bos="<|startoftext|>",
        eos="<|im_end|>",
        special="<|im_start|> <|tool_call_start|> <|tool_call_end|>",
        words=THINK,
        tail="\n",
    ),
    Family(
        "minimax_m2",
        answers.minimax,
        bos="]~!b[",
        eos="[e~[",
        special="]~b]",
        words=THINK + " " + "<minimax:tool_call> </minimax:tool_call>",
        tail="\n",
    ),
    Family(
        "chatml",
        answers.ending("<|im_end|>"),
        eos="<|im_end|>",
        special="<|im_start|>",
        tail="\n",
        refuses=NO_TOOLS | NO_REASONING,
    ),
    Family(
        "vicuna",
        lambda turn: f" {turn.content}</s>",
        bos="<s>",
        eos="</s>",
        refuses=NO_REASONING | {"tools": EITHER, "calls": EITHER},
    ),
]
