"""Ranks as a replicate × shard mesh."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device: str, world_size: int, shard_size: int) -> DeviceMesh:
    """A (world_size / shard_size) × shard_size mesh; `shard_size` consecutive ranks share one copy.

    With axis `shard` of size 1 the state is only replicated, with axis `replicate` of size 1 it is
    only sharded. Raises ValueError if `shard_size` does not divide `world_size`.
    """
    if world_size % shard_size:
        raise ValueError(f"{world_size} ranks cannot be divided into groups of {shard_size}")
    return init_device_mesh(
        device, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )
