"""Opens what a run starts from: the model folder, with new tokens if there are any, and its
tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from launcher.config import Config
from launcher.folders.extended_model import describe_extension
from launcher.folders.vocabulary import embedding_rows, tokens_without_row
from launcher.io.new_tokens import base_model_folder
from launcher.io.tokenizer_files import read_files
from launcher.model.tokenizer import load_tokenizer, trained_files


def open_model(config: Config, log: Callable[[str], None]) -> tuple[Path, PreTrainedTokenizerBase]:
    """The local folder of `model=`, and its tokenizer for `data=`. Raises UserError if one of them
    cannot be opened.

    `log` receives lines about new tokens, and about tokens that the model has no row for.
    """
    model, data = config.model, config.data
    code = model.trust_remote_code
    folder = base_model_folder(model.name_or_path, model.revision, code, model.add_tokens)
    if model.add_tokens:
        log(f"new tokens: {describe_extension(folder)}")
    tokenizer = load_tokenizer(folder, code, data.format != "text", data.template)
    rows = embedding_rows(folder)
    if missing := tokens_without_row(tokenizer.get_vocab(), rows):
        log(
            f"tokenizer: the embedding has {rows:,} rows and none for {', '.join(missing)}: data "
            "with such a token cannot be used → "
            f"model.add_tokens={json.dumps([*missing], ensure_ascii=False, separators=(',', ':'))}"
        )
    return folder, tokenizer


def files_to_save(
    config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, bytes]:
    """Name → content of the tokenizer files that a checkpoint keeps; {}: the base's serve.

    `folder` and `tokenizer` are those of `open_model`.
    """
    if config.data.template is not None:
        return trained_files(folder, tokenizer)
    return read_files(folder) if config.model.add_tokens else {}
