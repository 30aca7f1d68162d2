"""What a rank needs in host memory to load and to save, and what a checkpoint needs on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from launcher.config import Config
from launcher.config.schema.strategy import ZeroConfig
from launcher.config.schema.training import CheckpointConfig
from launcher.errors import UserError
from launcher.folders.json_file import read_object_or_empty
from launcher.folders.model import CONFIG, model_folder
from launcher.io.conversion import published_tensors
from launcher.io.stated_dtype import stated_dtype
from launcher.io.weight_views import LazyWeight
from launcher.memory.fake_weights import FakeWeight
from launcher.model.folder import SafetensorsFolder
from launcher.model.load import find_weights
from launcher.strategy import Strategy
from launcher.strategy.precision import precision_of


def reads_whole_model(config: Config, model: Any) -> bool:
    """Whether every rank will read the complete model, because transformers computes parameters of
    `model`, which are on meta, from the values in the files.

    The files decide if they are on this machine. Otherwise it is assumed that they are as
    transformers publishes such models.
    """
    source, compute = config.model, precision_of(config.precision).compute
    name, code = source.name_or_path, source.trust_remote_code
    folder = model_folder(name, source.revision, code, patterns=("config.json",))
    stored: Mapping[str, LazyWeight]
    try:
        stored = SafetensorsFolder(folder)
    except (OSError, UserError):  # there is only config.json
        try:
            tensors = published_tensors(model)
        except Exception:  # transformers cannot undo a conversion: it cannot be read in slices
            return True
        stored = {name: FakeWeight(each.shape, each.dtype) for name, each in tensors.items()}
    return find_weights(model, folder, stored, compute).obstacle is not None


def whole_model_bytes(config: Config, model: nn.Module) -> int:
    """Host memory of a rank that reads the complete `model`, which the method has prepared: the
    tensors as stored, and then in the dtype in which they are trained."""
    precision = precision_of(config.precision)
    stored = cast = trained = 0
    for parameter in model.parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        size = numel * precision.compute.itemsize
        stored += size if parameter.is_floating_point() else 2 * size  # two elements of 4 bits
        cast += numel * precision.master.itemsize if parameter.requires_grad else size
        trained += size * parameter.requires_grad
    if isinstance(config.strategy, ZeroConfig):
        return stored + trained  # it keeps the exact values of trained parameters
    return max(stored, cast)


def export_bytes(config: Config, model: nn.Module) -> int:
    """What an export of `model` needs on disk, before the method has prepared it: its parameters in
    the dtype that config.json states, or fp32."""
    source = config.model
    folder = model_folder(
        source.name_or_path,
        source.revision,
        source.trust_remote_code,
        patterns=("config.json",),
    )
    described = read_object_or_empty(folder / CONFIG)
    dtype = stated_dtype(described) or torch.float32
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def save_bytes(
    config: CheckpointConfig, strategy: Strategy, is_adapter: bool, ranks: int
) -> dict[str, int]:
    """`checkpoint`, `checkpoint_files`, `staging` and `gathering` of MemoryUsage."""
    state = strategy.state()
    moments = state.moments.values() if config.content == "all" else ()
    files = [list(state.weights.values()), [shard for each in moments for shard in each.values()]]
    sizes = [sum(shard.nbytes for shard in shards) for shards in files]
    if is_adapter:  # rank 0 has all tensors, and the content of one file at a time
        files_used = sum(size > 0 for size in sizes)
        gathering = sum(sizes) + max(sizes)
        return {
            "checkpoint": sum(sizes),
            "checkpoint_files": files_used,
            "gathering": gathering,
            "staging": 0,
        }
    buffers = list(state.buffers.values())
    shards = [*files[0], *files[1], *buffers]
    staging = sum(shard.local.nbytes for shard in shards) if config.async_save else 0
    total = sum(sizes) + sum(shard.nbytes for shard in buffers)
    return {"checkpoint": total, "checkpoint_files": ranks, "gathering": 0, "staging": staging}
