"""Reads config.json of a model folder, with the types of what is used in it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders.json_file import (
    COUNT,
    FLAG,
    IDS,
    OBJECT,
    TEXT,
    TEXTS,
    Field,
    check_fields,
    read_object,
)

# The deepest models have a few hundred layers. Each becomes a dozen Python objects.
MAX_LAYERS, MAX_EXPERTS = 2_000, 100_000
NESTED = "text_config"
FIELDS: dict[str, Field] = {
    "model_type": TEXT,
    "architectures": TEXTS,
    "text_config": OBJECT,
    "quantization_config": OBJECT,
    "auto_map": OBJECT,
    "dtype": TEXT,
    "torch_dtype": TEXT,
    "tie_word_embeddings": FLAG,
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "n_layer": COUNT,
    "max_position_embeddings": COUNT,
    "n_positions": COUNT,
    "bos_token_id": IDS,
    "eos_token_id": IDS,
}


def read_model_config(path: Path) -> dict[str, Any]:
    """The object in a config.json. Raises UserError if a value that is used has another type, or if
    no machine could build the model."""
    config = read_object(path)
    check_model_config(path, config)
    return config


def check_model_config(path: Path, config: dict[str, Any]) -> None:
    """The checks of `read_model_config`. `path`: for messages."""
    check_fields(path, config, FIELDS)
    for key, value in config.items():
        if type(value) is int and value > _limit(key):
            raise UserError(f"{path}: {key} is {value}, and no model has more than {_limit(key):,}")
    if isinstance(nested := config.get(NESTED), dict):
        check_model_config(path, nested)


def _limit(key: str) -> float:
    if "layer" in key:
        return MAX_LAYERS
    return MAX_EXPERTS if "expert" in key else float("inf")
