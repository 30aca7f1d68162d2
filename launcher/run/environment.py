"""What a rank needs in its environment before torch is imported, whoever has started it.

`shardway train`, a Slurm job and a person's own torchrun all end in launcher/worker.py, which calls
`prepare` first. Imports no torch.
"""

from __future__ import annotations

import os

# Segments that grow: batches of many lengths then fragment little of a GPU's memory.
ALLOCATOR = "expandable_segments:True"
# torch reads the first of these that is set.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# cuBLAS needs workspaces of its own for sums in a fixed order, and flash-attn a request.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}


def prepare(deterministic: bool) -> None:
    """Set the variables that the user has not set. `deterministic`: training.deterministic."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    for name, value in DETERMINISTIC.items() if deterministic else ():
        os.environ.setdefault(name, value)
