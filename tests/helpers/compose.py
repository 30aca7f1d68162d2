"""Complete configurations, from a valid mapping or from command-line overrides."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest

from launcher.config import Config
from launcher.config.compose import compose_command_line


def composed_raw(**changes: dict[str, Any]) -> dict[str, Any]:
    """A valid mapping with some sections changed."""
    raw: dict[str, Any] = {
        "model": {"name_or_path": "m"},
        "data": {"path": "d.jsonl"},
        "method": {"name": "lora"},
        "strategy": {"name": "fsdp"},
        "precision": {"name": "fp32"},
        "optimizer": {"name": "adamw"},
        "scheduler": {"name": "cosine"},
        "cluster": {"name": "local"},
    }
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return raw


@functools.cache
def composed(*overrides: str) -> Config:
    """The configuration of `shardway train model=tiny` with these overrides. Composing takes a
    third of a second, so each configuration is cached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shardway train", "model=tiny", *overrides])
        (config,) = compose_command_line()
    return config
