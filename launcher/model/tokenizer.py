"""The tokenizer of a model folder, checked for what training needs."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher import paths
from launcher.errors import UserError

# The marks of turns in a template: <|im_end|>, <start_of_turn>, [INST].
MARKS = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


def load_tokenizer(
    folder: Path, trust_remote_code: bool, chat: bool = True, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, with another chat template where one is named.

    Raises UserError when the folder holds no tokenizer or, with `chat`, the tokenizer no chat
    template: of a local folder the rule table has said so before, not of a hub id.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name_or_path={folder} holds no tokenizer: {error}") from error
    if template is not None:
        _take_template(tokenizer, template)
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; put a chat_template.jinja beside it, "
            "or choose one with data.template"
        )
    return tokenizer


def _take_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """A file's text, or a template of ours. The token that ends its answers becomes the end token:
    a server stops there."""
    file = Path(template) if template.endswith(".jinja") else paths.templates()[template]
    text = file.read_text(encoding="utf-8")
    for mark in sorted(set(MARKS.findall(text))):
        if len(tokenizer(mark, add_special_tokens=False)["input_ids"]) != 1:
            raise UserError(
                f"data.template={template} writes {mark}, which is no token of this tokenizer → "
                "data.template=alpaca, which needs none, or a model with that token"
            )
    tokenizer.chat_template = text
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ends = MARKS.findall(str(tokenizer.apply_chat_template(said, tokenize=False)))
    if ends:
        tokenizer.eos_token = ends[-1]
