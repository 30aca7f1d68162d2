"""Nulls that Arrow adds to rows: every object gets the keys of all other objects at its place.

Arrow files, Parquet files and data sets of the hub always have them. JSON files have them if they
were written from such rows, as `datasets.Dataset.to_json` does. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# A message has one of these fields. A null beside it means the same as no field.
SPEAKER_FIELDS = ("role", "from")

Place = tuple[str, ...]  # the keys that lead to an object; positions in lists are not counted


def remove_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """`row` without the nulls inside its columns."""
    return {name: _remove_nested_nulls(value) for name, value in row.items()}


def _remove_nested_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _remove_nested_nulls(v) for k, v in value.items() if v is not None}
    return [_remove_nested_nulls(item) for item in value] if isinstance(value, list) else value


def has_nested_null(row: Any) -> bool:
    """Whether an object inside a column has a null that may be an argument or part of a schema."""
    if not isinstance(row, dict):
        return False
    columns = (value if isinstance(value, list) else [value] for value in row.values())
    return any(_has_null(item, is_message=_is_message(item)) for items in columns for item in items)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and any(isinstance(item.get(f), str) for f in SPEAKER_FIELDS)


def _has_null(value: Any, is_message: bool = False) -> bool:
    if isinstance(value, list):
        return any(map(_has_null, value))
    return isinstance(value, dict) and any(
        _has_null(child) or (child is None and not is_message) for child in value.values()
    )


def may_be_added(rows: Iterable[Any]) -> bool:
    """Whether the nulls inside `rows` may come from Arrow: no two objects at the same place have
    different keys. Reads only as many rows as it takes to find two."""
    keys: dict[Place, frozenset[str]] = {}
    return all(_have_equal_keys(row, (), keys) for row in rows)


def _have_equal_keys(value: Any, place: Place, keys: dict[Place, frozenset[str]]) -> bool:
    if isinstance(value, list):
        return all(_have_equal_keys(item, place, keys) for item in value)
    if not isinstance(value, dict):
        return True
    own = frozenset(value)
    return keys.setdefault(place, own) == own and all(
        _have_equal_keys(child, (*place, key), keys) for key, child in value.items()
    )
