"""How often this process looks for garbage: cycles of objects, which nothing else frees."""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
IMPORTING = 50_000  # new objects; at Python's 700, a sixth of the time of imports goes there


def collect_seldom() -> None:
    """From now on: the modules of torch and transformers are a million objects that stay."""
    gc.set_threshold(IMPORTING)


def collect_as_usual() -> None:
    """From now on. The objects that exist now stay; later collections skip them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*USUAL)
