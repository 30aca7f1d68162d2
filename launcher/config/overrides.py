"""Overrides as they are typed: what they imply, and how Hydra accepts them. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString

from launcher.config import store
from launcher.config.secrets import MASK, masked_values
from launcher.errors import UserError
from launcher.folders import paths

ENVIRONMENT = "cluster.environment"
MISSING = "???"  # OmegaConf's word for a value that is still to be set


# Parts of Hydra that would start the runs of a sweep; Shardway composes them all, then starts them.
UNUSED_PARTS = ("sweeper", "launcher")


@dataclass(frozen=True)
class Implied:
    """What a typed setting implies, unless the key of `override` is typed, too."""

    setting: str
    override: str
    replaces: str | None = None  # of a group: only in place of this file, if no file chooses it


# The first that applies to a key wins. Listed in docs/launching.md.
IMPLIED = (
    Implied("data.dataset_info", "data=llamafactory", replaces="demo"),
    Implied("data.sources", "data=base", replaces="demo"),
    Implied("data.path", "data=base", replaces="demo"),
    Implied("training.max_steps", "++training.epochs=null"),
    Implied("training.epochs", "++training.max_steps=null"),
)


def parse(words: list[str], loader: ConfigLoader | None = None) -> list[Override]:
    """The overrides in Hydra's grammar. Raises Hydra's OverrideParseException."""
    return OverridesParser.create(loader).parse_overrides(words)


def prepared(words: list[str], multirun: bool = False) -> list[str]:
    """`words` as Hydra accepts them: an entry of a mapping with free names gets `++`, so that it
    may be new and may exist; without `multirun`, data.name=a,b is a text and not a sweep.

    Raises UserError for a value that is ???, which stands for none, and for a setting of Hydra that
    Shardway does not use.
    """
    if not multirun:
        words = [re.sub(r"^data\.name=([\w.,-]+)$", r"data.name='\1'", word) for word in words]
    overrides = parse(words)
    for override in overrides:
        _check(override)
    return [_with_plus(override) for override in overrides]


def _check(override: Override) -> None:
    word, key = override.input_line, override.key_or_group
    if re.match(rf"hydra[./]({'|'.join(UNUSED_PARTS)})\b", key):
        raise UserError(
            f"{word} has no effect here: shardway starts the runs of a sweep itself "
            "→ --multirun SETTING=A,B"
        )
    is_group = (paths.resource("conf") / key).is_dir() and not override.is_delete()
    if is_group and not all(isinstance(name, str | Glob) for name in _scalars(override.value())):
        raise UserError(f"{word} names no file of conf/{key}/ → {key}=NAME, or leave it out")
    if not override.is_hydra_override() and MISSING in _scalars(override.value()):
        raise UserError(
            f"{word}: {MISSING} stands for a value that is missing → {key}=VALUE, or leave it out"
        )


def _with_plus(override: Override) -> str:
    word = str(override.input_line)
    is_entry = store.mapping_setting(override.key_or_group) and not override.is_delete()
    return f"++{word.lstrip('+')}" if is_entry else word


def _scalars(value: Any) -> Iterator[Any]:
    """The values in a parsed value: in lists, in mappings, and of a sweep."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _scalars(item)
    else:
        yield value.text if isinstance(value, QuotedString) else value


def implied(words: list[str]) -> list[Implied]:
    """What `words` imply, without looking at files: see `replaces`."""
    overrides = parse(words)
    typed = {override.key_or_group for override in overrides}
    given = [override.key_or_group for override in overrides if _has_value(override)]
    found: dict[str, Implied] = {}
    for each in IMPLIED:
        key = key_of(each.override)
        if key not in typed and any(f"{name}.".startswith(f"{each.setting}.") for name in given):
            found.setdefault(key, each)
    return list(found.values())


def _has_value(override: Override) -> bool:
    """Whether an override sets something: not null and not an empty mapping, in no run of a
    sweep."""
    if override.is_delete():
        return False
    value = override.value()
    return all(item not in (None, {}) for item in getattr(value, "list", [value]))


def sweeps_of_groups(words: list[str], loader: ConfigLoader) -> list[list[str]]:
    """For each override, itself, or one for each file if it sweeps over files of a group, which
    `loader` finds for `glob(*)`."""
    return [
        [f"{override.get_key_element()}={name}" for name in override.sweep_string_iterator()]
        if "." not in override.key_or_group and override.is_choice_sweep()
        else [word]
        for word, override in zip(words, parse(words, loader), strict=True)
    ]


def overrides_in(fix: str) -> list[str]:
    """The overrides in the first alternative of a rule's fix; empty if it is plain text."""
    words = fix.partition(", or ")[0].split()
    return [word for word in words if re.match(r"[+~]?[a-z][\w./]*=", word)]


def apply_changes(overrides: list[str], changes: list[str]) -> list[str]:
    """`overrides` with `changes`: each replaces the override of the same key, or is appended."""
    remaining = {key_of(change): change for change in changes}
    return [remaining.pop(key_of(word), word) for word in overrides] + list(remaining.values())


def masked(words: list[str], secrets: Collection[str]) -> list[str]:
    """`words` with `•••` in place of the values of `secrets`, variables in cluster.environment."""
    return [_masked(word, secrets) for word in words]


def _masked(word: str, secrets: Collection[str]) -> str:
    key, equals, _ = word.partition("=")
    section, _, name = key.lstrip("+~").partition(ENVIRONMENT)
    if section or not equals:
        return word
    if name.removeprefix(".") in secrets:
        return f"{key}={MASK}"
    if name or not secrets:
        return word
    value = parse([word])[0].value()
    if not isinstance(value, dict):  # of a sweep
        return f"{key}={MASK}"
    plain = {str(next(_scalars(name))): next(_scalars(item)) for name, item in value.items()}
    return f"{key}={format_value(masked_values(plain, secrets))}"


def key_of(override: str) -> str:
    """The key of an override, without a prefix."""
    return override.partition("=")[0].lstrip("+~")


def quote(value: str, is_text: bool = True) -> str:
    """A text in quotes if Hydra would parse it as something else without them."""
    plain = re.fullmatch(r"[\w./+-]+", value, re.ASCII)
    number = re.fullmatch(r"[+-]?[\d._]+(e[+-]?\d+)?|null|true|false|nan|[+-]?inf", value, re.I)
    if plain and not (is_text and number):
        return value
    quoted = re.sub(r"(\\*)'", lambda match: f"{match[1] * 2}\\'", value)
    quoted = re.sub(r"(\\+)$", lambda match: match[1] * 2, quoted)
    return f"'{quoted}'"


def format_value(value: Any) -> str:
    """A value from YAML in Hydra's grammar."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{format_value(item)}' for key, item in value.items())}}}"
    return json.dumps(value)
