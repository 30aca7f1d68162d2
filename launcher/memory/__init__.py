"""The memory that a run needs, measured without a GPU and without weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryUsage:
    """The memory of the rank that needs most, in bytes."""

    weights: int  # between steps: working weights, masters, buffers of an engine
    optimizer: int  # between steps: the optimizer state
    activations: int  # saved for the backward of a micro-batch
    peak: int  # on the GPU, without the tensors that offloading keeps in host memory
    phase: str  # of the peak: loading, forward, backward or optimizer step
    warning: str | None = None  # of the strategy
    host: int  # in host memory because of offloading, including gradients
    # The rest is in host memory, or on disk.
    loading: int = 0  # while the model is read
    staging: int = 0  # copies of the shards for checkpoint.async_save; pinned with GPUs
    gathering: int = 0  # on rank 0, while it saves an adapter
    checkpoint: int = 0  # on disk, of all ranks
    checkpoint_files: int = 0  # with tensors
    export: int = 0  # on disk, in the dtype of the model's files
