"""The files beside the weights that an export copies: of the tokenizer, and those that describe the
model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.source import Source, model_home, tokenizer_folder
from launcher.folders import regular
from launcher.folders.adapter import SETTINGS
from launcher.folders.json_file import (
    IDS,
    NUMBER,
    OBJECT,
    TEXT,
    Field,
    check_fields,
    read_object,
)
from launcher.folders.model import CONFIG, GENERATION_CONFIG, MODELOPT
from launcher.folders.model import TOKENIZER_FILES as TOKENIZER

MANIFEST = "consolidation_manifest.json"
PROCESSOR = ("*processor_config.json",)
# The files in the model's folder that describe the model are copied. Weights, and files that
# trainers write for themselves, are not.
COPIED = (
    *TOKENIZER,
    *PROCESSOR,
    "*.json",
    "*.jinja",
    "*.txt",
    "*.py",
    "*.tiktoken",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
NOT_COPIED = (
    *("*.index.json", ".*", "zero_to_*.py", "trainer_state.json", "*_results.json", "trainer.json"),
    *("manifest.json", "ds_config*.json", "*deepspeed*.json", MANIFEST, SETTINGS, CONFIG),
)
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
    """Name → file to copy: those of the tokenizer only for an adapter, none for images and sounds
    for a text model.

    Files that describe the model come from its folder. All files of the tokenizer come from the
    first folder that has one.
    """
    files: dict[str, Path] = {}
    home = None
    if not options.adapter_only:
        home = model_home(source)
        files |= {p.name: p for p in _files(home, COPIED) if not _matches(p, NOT_COPIED)}
    folder = tokenizer_folder(source)
    if folder is not None and folder != home:
        others = {name: path for name, path in files.items() if not _matches(path, TOKENIZER)}
        files = others | {path.name: path for path in _files(folder, (*TOKENIZER, *PROCESSOR))}
    if not options.base_format:
        files.pop(MODELOPT, None)  # the weights are no longer quantized
    if options.text_only:
        files = {name: path for name, path in files.items() if not _matches(path, PROCESSOR)}
    return files


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and _matches(path, patterns)]


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def check_copied_files(files: Mapping[str, Path]) -> None:
    """Raises UserError for a file that was cut short, or has a value that no reader accepts.

    `files`: name → file, as `find_copied_files` returns them.
    """
    for name, path in sorted(files.items()):
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
        return
    try:
        json.loads(regular.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON: {error!s:.200}") from error


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
