"""Ranks as a replicate × shard grid."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device: str, world_size: int, shard_size: int) -> DeviceMesh:
    """A (world_size / shard_size) × shard_size mesh; neighbours in rank share one copy.

    Axis `shard` of size 1 is replication alone, axis `replicate` of size 1 sharding alone.
    """
    if world_size % shard_size:
        raise ValueError(f"{world_size} ranks do not form groups of {shard_size}")
    return init_device_mesh(
        device, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )
