"""Which folder of a source describes the model, and which one has the tokenizer."""

from __future__ import annotations

from itertools import chain, takewhile
from pathlib import Path

from launcher.export.source import Source
from launcher.folders.model import CONFIG, GENERATION_CONFIG
from launcher.io.tokenizer_files import SETTINGS as TOKENIZER
from launcher.io.tokenizer_files import has_vocabulary, stated_template


def tokenizer_folder(source: Source) -> Path | None:
    """The folder of the tokenizer, None if there is none: the first with settings and a vocabulary.
    The training's folder comes before the base's: its tokenizer may have more tokens.

    Without such a folder it is the first with a vocabulary, or else with settings: some classes
    need no vocabulary.
    """
    folders = _tokenizer_folders(source)
    complete = (f for f in folders if (f / TOKENIZER).is_file() and has_vocabulary(f))
    with_vocabulary = (f for f in folders if has_vocabulary(f))
    with_settings = (f for f in folders if (f / TOKENIZER).is_file())
    return next(chain(complete, with_vocabulary, with_settings), None)


def template_folder(source: Source) -> Path | None:
    """The training's folder if it has a chat template but no vocabulary, and so not the tokenizer;
    None otherwise."""
    if (tokenizer := tokenizer_folder(source)) is None:
        return None
    before = takewhile(lambda folder: folder != tokenizer, _tokenizer_folders(source))
    return next((folder for folder in before if stated_template(folder) is not None), None)


def generation_config(source: Source) -> Path | None:
    """generation_config.json of the model, or else of the training; None if neither has one."""
    folders = (model_home(source), *source.extra_file_folders, source.path)
    files = (folder / GENERATION_CONFIG for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _tokenizer_folders(source: Source) -> tuple[Path, ...]:
    return (*source.extra_file_folders, *([source.base] if source.base else []))


def model_home(source: Source) -> Path:
    """The folder whose files describe the model: that of the base, or the first with a config."""
    return source.base or next(f for f in source.extra_file_folders if (f / CONFIG).is_file())
