"""Sizes of memory and files as people write them."""

from __future__ import annotations

import re

from launcher.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes: `5GB` is 5·10⁹, `5GiB` 5·2³⁰."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"{option} {text} is no size; write 5GB, 500MB or 5GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])
