"""Which file each tensor goes to: Hugging Face's rule, so that a folder looks as they expect."""

from __future__ import annotations

import re
from collections.abc import Iterable

from launcher.errors import UserError
from launcher.export.tensor import Tensor

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes: `5GB` is 5·10⁹, `5GiB` 5·2³⁰."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"{option} {text} is no size; write 5GB, 500MB or 5GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def assign(tensors: Iterable[Tensor], cap: int) -> list[list[Tensor]]:
    """Fill shards in order up to `cap` tensor bytes. A larger tensor gets a shard of its own, which
    comes before the one being filled (huggingface_hub.split_torch_state_dict_into_shards)."""
    shards: list[list[Tensor]] = []
    filling: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.nbytes > cap:
            shards.append([tensor])
            continue
        if size + tensor.nbytes > cap:
            shards.append(filling)
            filling, size = [], 0
        filling.append(tensor)
        size += tensor.nbytes
    if filling:
        shards.append(filling)
    # Wider dtypes first keeps every tensor aligned to its element size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
