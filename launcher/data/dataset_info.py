"""LLaMA-Factory's dataset_info.json, read as it is. No torch.

Its format: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.config.data import HUB, SourceConfig
from launcher.errors import UserError

# Our field of a row: its name for the column.
ALPACA = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    "history": "history",
    "system": "system",
}
SHAREGPT = {"conversations": "messages", "system": "system", "tools": "tools"}
# What it learns by other means than the next token, and what no text is.
UNREAD = ("ranking", "script_url", "folder")
UNREAD_COLUMNS = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")


def read(path: str, names: str, text: bool) -> dict[str, SourceConfig]:
    """The data sets that `names` (a,b) lists, by name; `text` reads them as raw text.

    Raises UserError for a name that is not there, or an entry that is not text to learn from.
    """
    listed = _load(Path(path))
    found = {}
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name not in listed:
            raise UserError(
                f"data.name={name} is none of {path}; there are {', '.join(sorted(listed))}"
            )
        found[name] = _source(Path(path), name, listed[name], text)
    if not found:
        raise UserError(f"data.name names no data set of {path}; say data.name=a,b")
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.dataset_info={path} cannot be read: {error}") from error
    if not isinstance(listed, dict):
        raise UserError(f"data.dataset_info={path} holds no data sets by name")
    return listed


def _source(info: Path, name: str, entry: Any, text: bool) -> SourceConfig:
    where = f"data.dataset_info={info}: {name}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no entry with file_name or hf_hub_url")
    named = {**_mapping(where, entry, "columns")}
    for key in (*(k for k in UNREAD if entry.get(k)), *(c for c in UNREAD_COLUMNS if c in named)):
        raise UserError(f"{where} has {key}, which is not read here; take it out of data.name")
    most = entry.get("num_samples")
    if most is not None and not (isinstance(most, int) and most > 0):
        raise UserError(f"{where}: num_samples {most!r} is no number of rows")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{where}: formatting {formatting} is not one of alpaca, sharegpt, openai")
    return SourceConfig(
        path=_place(info, where, entry),
        **_layout(formatting, named, _mapping(where, entry, "tags"), text),
        max_rows=most,
        subset=entry.get("subset"),
        split=entry.get("split", "train"),
    )


def _layout(
    formatting: str, columns: dict[str, str], tags: dict[str, str], text: bool
) -> dict[str, Any]:
    if text:
        return {"format": "text", "columns": {"text": columns.get("prompt", "text")}}
    if formatting == "alpaca":
        taken = {ours: columns[name] for ours, name in ALPACA.items() if name in columns}
        return {"format": "alpaca", "columns": taken}
    words = {key.removesuffix("_tag"): word for key, word in tags.items()}
    if formatting == "openai" and not words:
        taken = {"messages": columns.get("messages", "messages")}
        return {"format": "messages", "columns": taken}
    if formatting == "openai":
        words = {"role": "role", "content": "content"} | words
    taken = {ours: columns[name] for ours, name in SHAREGPT.items() if name in columns}
    return {"format": "sharegpt", "columns": taken, "tags": words}


def _place(info: Path, where: str, entry: dict[str, Any]) -> str:
    if "hf_hub_url" in entry:
        return f"{HUB}{entry['hf_hub_url']}"
    if "file_name" not in entry:
        raise UserError(f"{where} has neither file_name nor hf_hub_url, which are read here")
    return str(info.parent / entry["file_name"])


def _mapping(where: str, entry: dict[str, Any], key: str) -> dict[str, str]:
    given = entry.get(key) or {}
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise UserError(f"{where}: {key} must give each name a word")
    return given
