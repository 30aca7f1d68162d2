"""Declare a setting: its default, its limits and its help text, all in one place.

`broken_limits` checks the limits; `docs/configuration.md` and the page show them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

_REQUIRED = object()


def setting(
    default: Any = _REQUIRED,
    help: str = "",
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: tuple[str | int, ...] = (),
) -> Any:
    """A dataclass field with limits. Without a default the setting is required.

    Args:
        minimum, maximum: Bounds that are themselves allowed.
        above: A lower bound that is not allowed.
        choices: All allowed values.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "choices": choices,
    }
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def limits(field: dataclasses.Field[Any]) -> str:
    """The limits of a setting as text, empty if it has none."""
    data = field.metadata
    if data["choices"]:
        return "one of " + ", ".join(map(str, data["choices"]))
    bounds = (("≥", data["minimum"]), (">", data["above"]), ("≤", data["maximum"]))
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def broken_limits(section: str, values: Any) -> Iterator[str]:
    """One message for each setting of the dataclass `values` that is outside its limits."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value is None or not field.metadata:
            continue
        items = value.values() if isinstance(value, dict) else value
        for name, item in value.items() if isinstance(value, dict) else ():
            if dataclasses.is_dataclass(item):
                yield from broken_limits(f"{section}.{field.name}.{name}", item)
        for item in items if isinstance(value, (list, dict)) else [value]:
            if dataclasses.is_dataclass(item):
                continue
            if not _within(field, item):
                yield f"{section}.{field.name}={item} must be {limits(field)}"


def _within(field: dataclasses.Field[Any], value: Any) -> bool:
    data = field.metadata
    if data["choices"]:
        return value in data["choices"]
    return (
        (data["minimum"] is None or value >= data["minimum"])
        and (data["above"] is None or value > data["above"])
        and (data["maximum"] is None or value <= data["maximum"])
    )
