"""The tokenizer of a model folder, with the checks that training needs."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from launcher.errors import UserError
from launcher.folders import paths
from launcher.io.answer_end import written_end
from launcher.io.tokenizer_files import FLAGS, with_template

# The tokens that mark turns in a bundled template: <|im_end|>, <start_of_turn>.
TURN_TOKEN = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


def load_tokenizer(
    folder: Path, trust_remote_code: bool, chat: bool = True, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`; with `chat`, it gets the chat template `template` if one is named.

    `template` is a .jinja file or the name of a bundled template. Raises UserError if the folder
    has no tokenizer, or with `chat` if there is no chat template. (The rule table has checked the
    template of a local folder already, but not that of a hub id.)
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class raises its own errors
        raise UserError(f"model.name_or_path={folder} has no tokenizer: {error}") from error
    if chat and template is not None:
        _set_template(tokenizer, template)
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; put a chat_template.jinja beside it, "
            "or choose one with data.template"
        )
    return tokenizer


def trained_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Name → content of the tokenizer files of `folder` with the template and the end token of
    `tokenizer`, which `load_tokenizer` loaded from there with a template."""
    end, end_in_folder = tokenizer.eos_token, tokenizer.init_kwargs.get("eos_token")
    changed = None if str(end) == str(end_in_folder) else str(end)
    return with_template(folder, str(tokenizer.chat_template), changed)


def _set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Set the chat template from a file or a bundled template.

    The token that ends its answers becomes the end-of-sequence token, because servers stop there.
    Raises UserError for a template that cannot be read, does not fit the tokenizer, or fails.
    """
    is_bundled = not template.endswith(".jinja")
    file = paths.templates()[template] if is_bundled else Path(template)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={template} cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"data.template={template} is empty")
    if is_bundled:
        for token in sorted(set(TURN_TOKEN.findall(text))):
            if not _is_token(tokenizer, token):
                raise UserError(
                    f"data.template={template} writes {token}, which is not a token of this "
                    "tokenizer → data.template=alpaca, which needs no special token, or a model "
                    "with that token"
                )
    tokenizer.chat_template = text
    try:
        end = written_end(tokenizer)
    except Exception as error:  # a template is a program and may raise anything
        raise UserError(
            f"data.template={template} cannot write a question and an answer: {error}"
        ) from error
    if end is not None and end != tokenizer.eos_token_id:
        _set_end(tokenizer, end)


def _set_end(tokenizer: PreTrainedTokenizerBase, end: int) -> None:
    """Make the token `end` the end-of-sequence token, and a special one: its text is always this
    token, and a decoded answer does not show it."""
    text = str(tokenizer.convert_ids_to_tokens(end))
    added = tokenizer.added_tokens_decoder.get(end)
    if added is None or not added.special:
        flags = {} if added is None else {name: getattr(added, name) for name in FLAGS}
        token = AddedToken(text, special=True, **flags)
        tokenizer.add_special_tokens({"eos_token": token})
    tokenizer.eos_token = text


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
