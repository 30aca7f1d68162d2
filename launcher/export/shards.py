"""Which file each tensor goes to: Hugging Face's rule, so that a folder looks as they expect."""

from __future__ import annotations

from collections.abc import Iterable

from launcher.export.tensor import Tensor


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
