"""Which class a model folder is trained with, and what builds it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.schema.model import ModelConfig
from launcher.errors import UserError
from launcher.folders.model import CONFIG
from launcher.folders.model_config import read_model_config
from launcher.folders.tensor_entries import tensor_names
from launcher.folders.vocabulary import TIE
from launcher.io.model_class import causal_class, class_and_places, trained_config
from launcher.io.places import Places
from launcher.model.trainable import refuse_untrainable


def find_class(config: ModelConfig, folder: Path) -> tuple[Any, Callable[..., Any], Places | None]:
    """transformers' configuration of `folder`, what builds the model that is trained, and where
    that is in the class of the folder. Raises UserError for a model that the ranks refuse."""
    code = config.trust_remote_code
    try:
        if (folder / CONFIG).is_file():
            read_model_config(folder / CONFIG)
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    except Exception as error:  # each class checks its values in its own way
        raise unreadable(folder, error) from error
    build, places = _builder(config, folder, architecture)
    refuse_untrainable(architecture, folder)
    return architecture, build, places


def _builder(
    config: ModelConfig, folder: Path, architecture: Any
) -> tuple[Callable[..., Any], Places | None]:
    """What builds the model that is trained, and where that is in the class of the folder. Raises
    UserError for a class that cannot be trained, or whose training could not be exported."""
    from_config, places = AutoModelForCausalLM.from_config, None
    if config.trust_remote_code and hasattr(architecture, "auto_map"):
        return partial(from_config, architecture, trust_remote_code=True), None
    try:
        trained, places = class_and_places(architecture)
    except UserError as error:
        raise UserError(f"model.name_or_path={folder}: {error}") from error
    if places is not None:
        _tie_as_composite(architecture, folder)
    if causal_class(architecture) is trained:
        return partial(from_config, architecture, trust_remote_code=False), places
    return partial(trained._from_config, trained_config(trained, architecture)), places


def _tie_as_composite(architecture: Any, folder: Path) -> None:
    """Tie the head of the text model, or not, if the composite's config and the files agree. Many
    composites are tied by default, and have a head in their files."""
    has_head = any(name.rpartition("lm_head")[2] == ".weight" for name in tensor_names(folder))
    if (is_tied := bool(getattr(architecture, TIE, False))) != has_head:
        architecture.get_text_config(decoder=True).tie_word_embeddings = is_tied


def unreadable(folder: Path, error: Exception) -> UserError:
    """A folder that a library cannot read."""
    return UserError(f"model.name_or_path={folder} cannot be read: {error or repr(error)}")
