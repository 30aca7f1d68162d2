"""The tokenizer of a model folder, checked for what training needs."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher import paths
from launcher.errors import UserError

# The marks of turns in a template: <|im_end|>, <start_of_turn>.
MARKS = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


def load_tokenizer(
    folder: Path, trust_remote_code: bool, chat: bool = True, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, with another chat template where one is named
    and `chat`.

    Raises UserError when the folder holds no tokenizer or, with `chat`, the tokenizer no chat
    template: of a local folder the rule table has said so before, not of a hub id.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name_or_path={folder} holds no tokenizer: {error}") from error
    if chat and template is not None:
        _take_template(tokenizer, template)
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; put a chat_template.jinja beside it, "
            "or choose one with data.template"
        )
    return tokenizer


def _take_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """A file's text, or a template of ours. The token that ends its answers becomes the end token:
    a server stops there. Raises UserError for a template that is none."""
    ours = not template.endswith(".jinja")
    file = paths.templates()[template] if ours else Path(template)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={template} cannot be read: {error}") from error
    if ours:
        for mark in sorted(set(MARKS.findall(text))):
            if not _is_token(tokenizer, mark):
                raise UserError(
                    f"data.template={template} writes {mark}, which is no token of this tokenizer "
                    "→ data.template=alpaca, which needs none, or a model with that token"
                )
    tokenizer.chat_template = text
    said = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        rendered = str(tokenizer.apply_chat_template(said, tokenize=False))
    except Exception as error:  # a template is a program: it raises what its author chose
        raise UserError(
            f"data.template={template} cannot write a question and an answer: {error}"
        ) from error
    behind = MARKS.findall(rendered.rpartition("ANSWER")[2])
    if behind and _is_token(tokenizer, behind[0]):
        tokenizer.eos_token = behind[0]


def _is_token(tokenizer: PreTrainedTokenizerBase, mark: str) -> bool:
    return len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1
