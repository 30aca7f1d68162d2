"""Values in Hydra's override grammar: formatted for `key=value`, and parsed. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from launcher.config import SECTIONS
from launcher.config.overrides import format_value, quote

__all__ = ["field_of", "format_field", "format_value", "parse_field", "type_of"]


@functools.cache
def field_of(key: str) -> dataclasses.Field[Any] | None:
    """The field of a setting, from the first schema of its section that has it."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        return None
    schema = SECTIONS[section]
    schemas = list(schema.values()) if isinstance(schema, dict) else [schema]
    fields = (field for each in schemas for field in dataclasses.fields(each))
    return next((field for field in fields if field.name == name), None)


def type_of(key: str) -> str:
    """A setting's declared type, such as `int | None`; `str` for an unknown key."""
    field = field_of(key)
    return str(field.type) if field else "str"


def format_field(key: str, value: bool | str) -> str:
    """The value of a field of the page as the right side of `key=value`."""
    if isinstance(value, bool):
        return str(value).lower()
    if not value:
        return "[]" if type_of(key).startswith("list") else "null"
    if type_of(key).startswith("list"):
        return f"[{','.join(quote(item.strip()) for item in value.split(',') if item.strip())}]"
    return quote(value, is_text=type_of(key).startswith("str"))


def parse_field(key: str, text: str) -> bool | str:
    """The right side of `key=value` as the value of a field of the page."""
    if type_of(key) == "bool":
        return text.lower() == "true"
    if text == "null":
        return ""
    if text.startswith("[") and text.endswith("]"):
        return ", ".join(_unquote(word.strip()) for word in text[1:-1].split(",") if word.strip())
    return _unquote(text)


def _unquote(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return re.sub(rf"\\+(?={text[0]}|$)", lambda m: "\\" * (len(m[0]) // 2), text[1:-1])
    return text
