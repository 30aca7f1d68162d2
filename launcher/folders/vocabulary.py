"""What a model folder says about its vocabulary: the embedding, the output head and their tie.
Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.folders.json_file import read_object_or_empty
from launcher.folders.model import CONFIG
from launcher.folders.tensor_entries import same_bytes, tensor_entries, tensor_names

EMBEDDING_MODULES = {
    "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed",
}  # fmt: skip
HEAD_MODULES = {
    "lm_head", "embed_out", "output", "output_layer", "output_projection", "head", "proj_out",
    "lm_loss", "pred_layer",
}  # fmt: skip
TIE = "tie_word_embeddings"


def config_value(config: dict[str, Any], key: str) -> Any:
    """The value in the config, or in its text_config."""
    text = config.get("text_config")
    if config.get(key) is None and isinstance(text, dict):
        return text.get(key)
    return config.get(key)


def config_changes(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The entries of config.json that change to `values`: at the top level, and in text_config if
    there is one."""
    changes: dict[str, Any] = {}
    text = config.get("text_config")
    if isinstance(text, dict):
        changes["text_config"] = {**text, **values}
    for key, value in values.items():
        if not isinstance(text, dict) or key in config or key == "tie_word_embeddings":
            changes[key] = value
    return changes


def embedding_rows(folder: Path) -> int | None:
    """The number of rows of the input embedding by config.json: token ids from there on have no
    row. None if it does not contain the number."""
    rows = config_value(read_object_or_empty(folder / CONFIG), "vocab_size")
    return rows if isinstance(rows, int) else None


def tokens_without_row(vocabulary: Mapping[str, int], rows: int | None) -> dict[str, int]:
    """The tokens of a tokenizer whose ids are beyond an embedding of `rows`, in the order of their
    ids. Empty if the number of rows is unknown."""
    if rows is None:
        return {}
    beyond = {token: number for token, number in vocabulary.items() if number >= rows}
    return dict(sorted(beyond.items(), key=lambda item: item[1]))


def stated_tie(config: dict[str, Any]) -> bool | None:
    """Whether the config ties the head to the embedding. None if it leaves it to the architecture:
    the key is absent, or transformers reads it in ways that depend on the class."""
    outer, text = config.get(TIE), config.get("text_config")
    inner = text.get(TIE) if isinstance(text, dict) else None
    if outer is None:
        return True if inner is True else None  # the outer default may be True
    return None if outer is False and inner is True else bool(outer)


def is_embedding(name: str) -> bool:
    """Whether a tensor name is that of an input embedding."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in EMBEDDING_MODULES


def find_missing_head(folder: Path) -> str | None:
    """The name of the output head, if config.json says that the model has its own one and no file
    contains it. None if there is one, or if this cannot be told without the model's code."""
    names = tensor_names(folder)
    embeddings = [name for name in names if is_embedding(name)]
    if len(embeddings) != 1 or stated_tie(read_object_or_empty(folder / CONFIG)) is not False:
        return None
    if any(HEAD_MODULES & {*name.split(".")} for name in names):
        return None
    entries, embedding = tensor_entries(folder), embeddings[0]
    shape = entries[embedding].shape if embedding in entries else None
    if any(entry.shape == shape for name, entry in entries.items() if name != embedding):
        return None  # a head of another name
    return "embed_out.weight" if embedding.endswith("embed_in.weight") else "lm_head.weight"


def find_separate_head(folder: Path) -> tuple[str, str] | None:
    """(head, embedding) of a folder whose config.json ties them, although its files contain two
    different tensors. None if they are equal, or if this cannot be told without the model's
    code."""
    if stated_tie(read_object_or_empty(folder / CONFIG)) is not True:
        return None
    names = tensor_names(folder)
    embeddings = [name for name in names if is_embedding(name)]
    heads = [name for name in names if name.rpartition(".lm_head")[2] == ".weight"]
    heads += [name for name in names if name in ("lm_head.weight", "embed_out.weight")]
    if len(embeddings) != 1 or len(set(heads)) != 1:
        return None
    entries = tensor_entries(folder)
    pair = heads[0], embeddings[0]
    if not entries.keys() >= {*pair}:
        return None
    head, embedding = (entries[name] for name in pair)
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return None  # the loader compares the values
    return None if same_bytes(head, embedding) else pair
