"""The tokenizer of a model folder, checked for what training needs."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.errors import UserError


def load_tokenizer(
    folder: Path, trust_remote_code: bool, chat: bool = True
) -> PreTrainedTokenizerBase:
    """Raises UserError when the folder holds no tokenizer or, with `chat`, the tokenizer no chat
    template: of a local folder the rule table has said so before, not of a hub id."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name_or_path={folder} holds no tokenizer: {error}") from error
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; put a chat_template.jinja beside it"
        )
    return tokenizer
