"""Hydra's grammar: what stands behind `key=`, written and read. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

from launcher.config import SECTIONS


@functools.cache
def field_of(key: str) -> dataclasses.Field[Any] | None:
    """The declaration of a setting, in whichever schema of its section has it."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        return None
    schema = SECTIONS[section]
    schemas = list(schema.values()) if isinstance(schema, dict) else [schema]
    fields = (each for one in schemas for each in dataclasses.fields(one))
    return next((each for each in fields if each.name == name), None)


def kind_of(key: str) -> str:
    """Its type, as declared: `int | None`."""
    found = field_of(key)
    return str(found.type) if found else "str"


def written(key: str, value: Any) -> str:
    """`value` as Hydra's grammar wants it behind `key=`."""
    if isinstance(value, bool):
        return str(value).lower()
    if not value:
        return "[]" if kind_of(key).startswith("list") else "null"
    if kind_of(key).startswith("list"):
        return f"[{','.join(_word(each.strip()) for each in value.split(',') if each.strip())}]"
    return _word(value, text=kind_of(key).startswith("str"))


def _word(value: str, text: bool = True) -> str:
    """A value between quotes where Hydra would read something else out of it."""
    plain = re.fullmatch(r"[\w./+-]+", value, re.ASCII)
    number = re.fullmatch(r"[+-]?[\d._]+(e[+-]?\d+)?|null|true|false|nan|[+-]?inf", value, re.I)
    if plain and not (text and number):
        return value
    quoted = re.sub(r"(\\*)'", lambda found: f"{found[1] * 2}\\'", value)
    quoted = re.sub(r"(\\+)$", lambda found: found[1] * 2, quoted)
    return f"'{quoted}'"


def text_of(value: Any) -> str:
    """A value of YAML as Hydra's grammar wants it."""
    if isinstance(value, str):
        return _word(value)
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{text_of(each)}' for key, each in value.items())}}}"
    return json.dumps(value)


def typed(key: str, text: str) -> Any:
    """The value that an override gives, as the page has it."""
    if kind_of(key) == "bool":
        return text.lower() == "true"
    if text == "null":
        return ""
    if text.startswith("[") and text.endswith("]"):
        return ", ".join(_unquoted(word.strip()) for word in text[1:-1].split(",") if word.strip())
    return _unquoted(text)


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return re.sub(rf"\\+(?={text[0]}|$)", lambda m: "\\" * (len(m[0]) // 2), text[1:-1])
    return text
