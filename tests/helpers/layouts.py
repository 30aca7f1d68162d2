"""Strategies × ranks that the suites share: (strategy, ranks, options)."""

from __future__ import annotations

from typing import Any

Layout = tuple[str, int, tuple[tuple[str, Any], ...]]

ONE_OF_EACH: list[Layout] = [
    ("single", 1, ()),
    ("ddp", 2, ()),
    ("fsdp", 3, ()),
    ("hsdp", 4, (("shard_size", 2),)),
    ("zero1", 2, ()),
    ("zero2", 3, ()),
    ("zero3", 3, ()),
]
