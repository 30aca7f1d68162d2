"""The files beside the weights that an export copies: of the tokenizer, and those that describe the
model."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.source import Source
from launcher.export.source_folders import generation_config, model_home, tokenizer_folder
from launcher.folders.file_names import matches
from launcher.folders.json_file import (
    IDS,
    NUMBER,
    OBJECT,
    TEXT,
    Field,
    check_fields,
    read_json,
    read_object,
)
from launcher.folders.kind import Kind
from launcher.folders.model import GENERATION_CONFIG, MODELOPT
from launcher.folders.model_files import files_of, is_describing
from launcher.folders.unreadable import reason_unreadable
from launcher.io.tokenizer_files import is_of_tokenizer, tokenizer_files

PROCESSOR = ("*processor_config.json",)
_TOKEN: Field = (lambda value: isinstance(value, str | dict), "text, or an object")


def _is_by_token_id(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for key, token in value.items()
    )


# JSON files that must be an object → the types of the values that every reader expects.
OBJECTS: dict[str, dict[str, Field]] = {
    GENERATION_CONFIG: {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS),
        **dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty"), NUMBER),
    },
    "tokenizer_config.json": {
        "tokenizer_class": TEXT,
        "added_tokens_decoder": (_is_by_token_id, "an object of objects by token id"),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
        "model_max_length": NUMBER,
        "chat_template": (lambda value: isinstance(value, str | list), "text, or a list of them"),
    },
    "tokenizer.json": {"model": OBJECT},
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "vocab.json": {},
    "chat_template.json": {},
    "*processor_config.json": {},
}


def find_copied_files(source: Source, options: Options) -> dict[str, Path]:
    """Name in the export → file to copy: none for images and sounds for a text model.

    Files that describe the model come from its folder, and those of an adapter that is written as
    one from the adapter's. Settings of generation and of a processor that it lacks come from the
    folders of the training. All files of the tokenizer come from one folder, `tokenizer_folder`.
    """
    files: dict[str, Path] = {}
    home = None
    if options.adapter_only:
        if source.kind is Kind.ADAPTER:
            home = source.path
            files = files_of(home).copied
    else:
        home = model_home(source)
        if home == source.base:
            files = files_of(home).copied
        else:
            files = {path.name: path for path in home.iterdir() if is_describing(path)}
            files |= tokenizer_files(home)
    folder = tokenizer_folder(source)
    if folder is not None and folder != home:
        files = {name: path for name, path in files.items() if not is_of_tokenizer(name)}
        files |= tokenizer_files(folder)
        files |= _processor_files(folder)
    for trained in (*source.extra_file_folders, source.path):
        files = _processor_files(trained) | files
    if not options.adapter_only and (generation := generation_config(source)) is not None:
        files[GENERATION_CONFIG] = generation
    if not options.base_format:
        files.pop(MODELOPT, None)  # the weights are no longer quantized
    if options.text_only:
        files = {name: path for name, path in files.items() if not matches(name, PROCESSOR)}
    return files


def _processor_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if matches(path.name, PROCESSOR)}


def check_copied_files(files: Mapping[str, Path]) -> None:
    """Raises UserError for a file that was cut short, or has a value that no reader accepts.

    `files`: name → file, as `find_copied_files` returns them.
    """
    for name, path in sorted(files.items()):
        if reason := reason_unreadable(path):
            raise UserError(f"{path} {reason}")
        if name.endswith(".json"):
            _check_json(path, name)
        elif name.endswith(".jinja"):
            _check_template(path)
    if (tokenizer := files.get("tokenizer.json")) is not None:
        _check_tokenizer(tokenizer)


def _check_json(path: Path, name: str) -> None:
    pattern = next((pattern for pattern in OBJECTS if fnmatch(name, pattern)), None)
    if pattern is not None:
        check_fields(path, read_object(path), OBJECTS[pattern])
    else:
        read_json(path)


def _check_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except BaseException as error:  # PanicException, of Rust, is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"{path} is damaged, or needs another version of tokenizers: {error!s:.200}"
        ) from error


def _check_template(path: Path) -> None:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TemplateError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not a chat template: {error!s:.200}") from error
