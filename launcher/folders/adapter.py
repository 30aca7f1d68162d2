"""The folder of a PEFT adapter. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders.checkpoint import ADAPTER, all_checkpoints
from launcher.folders.json_file import (
    FLAG,
    NUMBER,
    TEXT,
    TEXTS,
    Field,
    check_fields,
    is_count,
    is_text,
    list_of,
    read_object,
)

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_REPETITIONS = 8  # in a pattern: matching a name takes its length to this power
MAX_PATTERN = 10_000  # characters


def _is_rank(value: Any) -> bool:
    return is_count(value) and value > 0


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _by_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Accepts an object with patterns of module names as its keys."""
    return lambda value: (
        isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(check, value.values()))
    )


def _is_pattern(text: str) -> bool:
    """Whether it is a regular expression that matches a name in a short time: it repeats no group,
    and little else."""
    if len(text) > MAX_PATTERN:
        return False
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    is_nested = re.search(r"\)[*+{]", text) is not None
    return not is_nested and sum(map(text.count, "*+{")) <= MAX_REPETITIONS


_TEXT_OR_TEXTS: Field = (
    lambda value: _is_pattern(value) if is_text(value) else list_of(is_text)(value),
    "a list of texts, or a pattern that can be matched in a short time",
)
MAX_ALPHA = 1e9  # a delta that is scaled by more is beyond all numbers of a model
_ALPHA: Field = (
    lambda value: NUMBER[0](value) and abs(value) <= MAX_ALPHA,
    f"a number up to {MAX_ALPHA:g}",
)
# The settings that are read, or that PEFT reads before it has checked them.
FIELDS: dict[str, Field] = {
    "peft_type": TEXT,
    "revision": TEXT,
    "task_type": TEXT,
    "bias": TEXT,
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": _ALPHA,
    "lora_dropout": NUMBER,
    "rank_pattern": (_by_pattern(_is_rank), "ranks by patterns of module names"),
    "alpha_pattern": (_by_pattern(_ALPHA[0]), "numbers by patterns of module names"),
    "target_modules": _TEXT_OR_TEXTS,
    "exclude_modules": _TEXT_OR_TEXTS,
    "target_parameters": TEXTS,
    "modules_to_save": TEXTS,
    "use_dora": FLAG,
    "use_rslora": FLAG,
    "lora_bias": FLAG,
    "fan_in_fan_out": FLAG,
    "ensure_weight_tying": FLAG,
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or text"),
    "trainable_token_indices": (
        lambda value: (
            list_of(_is_integer)(value)
            or (isinstance(value, dict) and all(map(list_of(_is_integer), value.values())))
        ),
        "a list of token ids, or such lists by module",
    ),
}

# Those of the other methods of PEFT: the same names may have other meanings in them.
OTHER_KINDS = {name: FIELDS[name] for name in ("peft_type", "revision", "task_type")}


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in an adapter_config.json. Raises UserError if one is of another type."""
    settings = read_object(file)
    peft_type = settings.get("peft_type")
    is_other = isinstance(peft_type, str) and peft_type != "LORA"
    check_fields(file, settings, OTHER_KINDS if is_other else FIELDS)
    return settings


def adapter_folder(path: str) -> Path | None:
    """The PEFT folder that `path` is or contains, None if there is none.

    `path` is an adapter, a checkpoint, or a run, whose newest checkpoint is used.
    """
    start = Path(path)
    newest = next((c for c in all_checkpoints(start / "checkpoints") if c.is_finished), None)
    candidates = [start, start / ADAPTER, *([newest.path / ADAPTER] if newest else [])]
    return next(
        (c for c in candidates if (c / SETTINGS).is_file() and (c / WEIGHTS).is_file()), None
    )


def adapter_settings(path: str) -> dict[str, Any]:
    """adapter_config.json of the adapter that `path` is or contains; empty if unreadable."""
    folder = adapter_folder(path)
    try:
        return read_settings(folder / SETTINGS) if folder else {}
    except UserError:
        return {}
