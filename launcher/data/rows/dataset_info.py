"""LLaMA-Factory's dataset_info.json, read without conversion. Imports no torch.

The format: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.config.schema.data import HUB, SourceConfig
from launcher.errors import UserError

# Field of a row in data.columns to the key of LLaMA-Factory's `columns`.
ALPACA_COLUMNS = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
SHAREGPT_COLUMNS = {"conversations": "messages", "system": "system", "tools": "tools"}
# Entries for other objectives than the next token, and columns that are not text.
UNSUPPORTED_KEYS = ("ranking", "script_url", "cloud_file_name", "folder")
KNOWN_KEYS = (
    *("file_name", "file_sha1", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "subset"),
    *("split", "num_samples", "columns", "tags", *UNSUPPORTED_KEYS),
)
UNSUPPORTED_COLUMNS = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
TAGS = (
    *("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag"),
    "system_tag",
)
# Fields of data.columns that rows are complete without.
OPTIONAL_FIELDS = ("input", "history", "system", "tools")
NAME = "dataset_info.json"


def read(path: str, names: str, text: bool) -> dict[str, SourceConfig]:
    """The data sets that `names` (a,b) lists, by name. `text` reads them as raw text.

    Raises UserError for a name that `path` does not list, or an entry that is not supported.
    """
    info = Path(path) / NAME if Path(path).is_dir() else Path(path)
    entries = _load(info)
    sources = {}
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name not in entries:
            raise UserError(
                f"data.name={name} is not in {info} → data.name=A,B with some of "
                f"{', '.join(sorted(entries))}"
            )
        sources[name] = _source_config(info, name, entries[name], text)
    if not sources:
        raise UserError(f"data.name names no data set of {path}; set data.name=a,b")
    return sources


def _load(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.dataset_info={path} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"data.dataset_info={path} does not map names to data sets")
    return entries


def _source_config(info: Path, name: str, entry: Any, text: bool) -> SourceConfig:
    location = f"data.dataset_info={info}: {name}"
    if not isinstance(entry, dict):
        raise UserError(f"{location} is not an object with file_name or hf_hub_url")
    if unknown := sorted(entry.keys() - {*KNOWN_KEYS}):
        raise UserError(
            f"{location} has {unknown[0]}, which is not a key of an entry; the keys are "
            f"{', '.join(KNOWN_KEYS)}"
        )
    columns = _read_mapping(location, entry, "columns")
    unsupported = [key for key in UNSUPPORTED_KEYS if entry.get(key)]
    unsupported += [column for column in UNSUPPORTED_COLUMNS if column in columns]
    if unsupported:
        raise UserError(
            f"{location} has {unsupported[0]}, which is not supported; remove it from data.name"
        )
    known = (*ALPACA_COLUMNS.values(), *SHAREGPT_COLUMNS.values())
    tags = _read_mapping(location, entry, "tags")
    for key, names, mapping in (("columns", known, columns), ("tags", TAGS, tags)):
        if unknown := sorted(mapping.keys() - {*names}):
            raise UserError(
                f"{location} has {unknown[0]} in {key}; known are {', '.join(dict.fromkeys(names))}"
            )
    max_rows = entry.get("num_samples")
    if max_rows is not None and not (isinstance(max_rows, int) and max_rows > 0):
        raise UserError(f"{location}: num_samples {max_rows!r} is not a number of rows")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(
            f"{location}: formatting {formatting} is not one of alpaca, sharegpt, openai"
        )
    return SourceConfig(
        path=_data_path(info, location, entry),
        **_format_settings(formatting, columns, tags, text),
        max_rows=max_rows,
        subset=entry.get("subset"),
        split=entry.get("split", "train"),
    )


def _format_settings(
    formatting: str, columns: dict[str, str], tags: dict[str, str], text: bool
) -> dict[str, Any]:
    """The values of data.format, data.columns and data.tags."""
    if text:
        return {"format": "text", "columns": {"text": columns.get("prompt", "text")}}
    if formatting == "alpaca":
        return {"format": "alpaca", "columns": _rename_keys(columns, ALPACA_COLUMNS)}
    own_tags = {key.removesuffix("_tag"): value for key, value in tags.items()}
    if formatting == "openai" and not own_tags:
        return {
            "format": "messages",
            "columns": {
                "messages": columns.get("messages", "messages"),
                **_rename_keys(columns, {"system": "system", "tools": "tools"}),
            },
        }
    if formatting == "openai":
        own_tags = {"role": "role", "content": "content"} | own_tags
    own_columns = _rename_keys(columns, SHAREGPT_COLUMNS)
    return {"format": "sharegpt", "columns": own_columns, "tags": own_tags}


def _rename_keys(columns: dict[str, str], key_of_field: dict[str, str]) -> dict[str, str]:
    return {field: columns[key] for field, key in key_of_field.items() if key in columns}


def _data_path(info: Path, location: str, entry: dict[str, Any]) -> str:
    if "hf_hub_url" in entry:
        return f"{HUB}{entry['hf_hub_url']}"
    if "file_name" not in entry:
        raise UserError(
            f"{location} has neither file_name nor hf_hub_url; only these are supported"
        )
    return str(info.parent / entry["file_name"])


def _read_mapping(location: str, entry: dict[str, Any], key: str) -> dict[str, str]:
    mapping = entry.get(key) or {}
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise UserError(f"{location}: {key} must map names to strings")
    return mapping
