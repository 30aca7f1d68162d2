"""Where generation with an export stops: eos_token_id of generation_config.json and config.json.

The base's list may lack the token that ended the answers in training: a base model stops at
<|endoftext|>, but has learned to end its turns with <|im_end|>.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError, one_line
from launcher.export.copied_files import check_copied_files
from launcher.export.source import Source
from launcher.export.source_folders import (
    generation_config,
    model_home,
    template_folder,
    tokenizer_folder,
)
from launcher.folders.json_file import dump_like, read_object
from launcher.folders.model import GENERATION_CONFIG
from launcher.io.answer_end import end_tokens
from launcher.io.tokenizer_files import (
    stated_template,
    stated_tokens,
    tokenizer_files,
    with_template,
)

Config = dict[str, Any]

EOS = "eos_token_id"
TEXT_CONFIG = "text_config"  # in config.json of models that also see or hear
INHERITED = ("bos_token_id", "decoder_start_token_id", "pad_token_id")


@dataclass(frozen=True)
class Stops:
    """What an export changes so that generation stops at the end of an answer."""

    config: Config  # config.json
    files: dict[str, bytes] = field(default_factory=dict)  # name → content
    notes: tuple[str, ...] = ()  # messages for the user


def with_stops(source: Source, config: Config, trust_remote_code: bool) -> Stops:
    """`config` and generation_config.json with the tokens that ended the answers in training.

    Both are unchanged if generation_config.json already lists them all, or, if there is none,
    config.json.
    """
    tokenizer, notes = _trained_tokenizer(source, trust_remote_code)
    files: dict[str, bytes] = {}
    ends = source.end_tokens or ()
    if tokenizer is not None:
        ends = end_tokens(tokenizer) or _eos(tokenizer)
        if source.old_tokenizer is not None and tokenizer.chat_template:
            home = model_home(source)
            files = with_template(home, str(tokenizer.chat_template), tokenizer.eos_token)
        if (settings := template_folder(source)) is not None:
            notes += (_describe_template(source, settings),)
            home = tokenizer_folder(source) or settings
            files = with_template(home, str(tokenizer.chat_template), tokenizer.eos_token)
    if not ends and source.end_tokens is not None:
        notes = ("the chat template ends answers with no token: generation may not stop after one",)
    if not ends:
        return Stops(config, files, notes)
    path = generation_config(source)
    original = read_object(path) if path is not None else None
    changed = _listed(config, ends)
    if {*ends} <= {*_ids(original or {})} or (original is None and changed == config):
        return Stops(config, files, notes)  # generation already stops there
    generation = {**(original or _inherited(config)), EOS: _union(ends, config, original or {})}
    text = path.read_text(encoding="utf-8") if path is not None else ""
    files[GENERATION_CONFIG] = dump_like(generation, text).encode()
    stops = generation[EOS]
    listed = f"token{'s' * (len(stops) > 1)} {', '.join(map(str, stops))}"
    return Stops(changed, files, (*notes, f"generation stops at the {listed}"))


def _trained_tokenizer(source: Source, trust_remote_code: bool) -> tuple[Any, tuple[str, ...]]:
    """(a tokenizer that another trainer or an old version saved, None if there is none; notes)."""
    folder, settings = source.old_tokenizer or tokenizer_folder(source), template_folder(source)
    if settings is None and (source.end_tokens is not None or folder in (None, model_home(source))):
        return None, ()
    from transformers import AutoTokenizer  # takes seconds to import; few exports need it

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class raises its own errors
        reason = one_line(error)
        if settings is not None:
            raise UserError(
                f"{settings} has a chat template and no vocabulary, and the tokenizer in {folder} "
                f"cannot be loaded: {reason} → the files of the trained tokenizer in {settings}"
            ) from error
        note = f"the tokenizer in {folder} cannot be loaded, so {EOS} stays the base's: {reason}"
        return None, (note,)
    if settings is not None:
        _take_template(loaded, settings, folder)
    return loaded, ()


def _take_template(tokenizer: Any, settings: Path, folder: Path | None) -> None:
    """Give the tokenizer of `folder` the chat template and the EOS token of `settings`.

    Raises UserError if those settings name a token that the tokenizer does not have.
    """
    check_copied_files(tokenizer_files(settings))
    end, tokens = stated_tokens(settings)
    if missing := sorted(tokens - tokenizer.get_vocab().keys()):
        raise UserError(
            f"{settings} names the token {missing[0]} ({len(missing)} such tokens) and has no "
            f"vocabulary, and the tokenizer in {folder} has no such token → all files of the "
            f"trained tokenizer in {settings}"
        )
    tokenizer.chat_template = stated_template(settings)
    if end is not None:
        tokenizer.eos_token = end


def _describe_template(source: Source, settings: Path) -> str:
    return (
        f"the tokenizer is that of {tokenizer_folder(source)}, with the chat template of "
        f"{settings}, which has no vocabulary"
    )


def _eos(tokenizer: Any) -> tuple[int, ...]:
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _inherited(config: Config) -> Config:
    """What transformers takes from config.json if there is no generation_config.json."""
    text_config = config.get(TEXT_CONFIG) or {}
    values = {key: config.get(key, text_config.get(key)) for key in INHERITED}
    return {key: value for key, value in values.items() if value is not None}


def _listed(config: Config, ends: tuple[int, ...]) -> Config:
    """config.json with the ends, also in its text_config if that has EOS tokens of its own."""
    result = dict(config)
    text_config = config.get(TEXT_CONFIG) or {}
    if _ids(text_config) and not {*ends} <= {*_ids(text_config)}:
        result[TEXT_CONFIG] = {**text_config, EOS: _union(ends, text_config)}
    if not {*ends} <= {*(_ids(config) or _ids(text_config))}:
        result[EOS] = _union(ends, config)
    return result


def _union(ends: tuple[int, ...], config: Config, generation: Config | None = None) -> list[int]:
    """The ends, and then the EOS tokens of the base: of its generation config, if it has any."""
    nested = config.get(TEXT_CONFIG) or {}
    stated = _ids(generation or {}) or _ids(config) or _ids(nested)
    return list(dict.fromkeys([*ends, *stated]))


def _ids(config: Config) -> list[int]:
    """The EOS tokens of a config: one number, a list, or none."""
    stated = config.get(EOS)
    listed = stated if isinstance(stated, list) else [stated]
    return [token for token in listed if isinstance(token, int)]
