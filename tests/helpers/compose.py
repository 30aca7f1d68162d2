"""Whole configurations, from a valid mapping or from overrides as typed."""

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
    """What `shardway train model=tiny` with these overrides composes. It takes a third of a second:
    each configuration is composed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shardway train", "model=tiny", *overrides])
        (config,) = compose_command_line()
    return config
