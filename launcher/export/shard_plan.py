"""Assigns tensors to files by Hugging Face's rule, so that a folder has the usual structure."""

from __future__ import annotations

from collections.abc import Iterable

from launcher.io.tensor import Tensor


def assign_shards(tensors: Iterable[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Fill shards in order with up to `max_bytes` of tensors. A larger tensor gets its own shard,
    before the one that is being filled (huggingface_hub.split_torch_state_dict_into_shards)."""
    shards: list[list[Tensor]] = []
    filling: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.nbytes > max_bytes:
            shards.append([tensor])
            continue
        if size + tensor.nbytes > max_bytes:
            shards.append(filling)
            filling, size = [], 0
        filling.append(tensor)
        size += tensor.nbytes
    if filling:
        shards.append(filling)
    # With the widest dtypes first, every tensor is aligned to its element size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
