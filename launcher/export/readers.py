"""Which reader opens a folder that a trainer left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.kind import SHARDED, Kind, kinds_of
from launcher.io.adapter import read_adapter
from launcher.io.readers import dcp, dcp_safetensors, model_folder, universal, zero
from launcher.io.readers.found import FoundModel
from launcher.io.readers.nesting import one_model

Reader = Callable[[bool], FoundModel]  # the argument: whether fp32 masters are wanted


def kind_of(path: Path) -> Kind | None:
    """The most specific kind of the folder. An adapter that was saved without gathering it (ZeRO-3)
    has no elements: the sharded state beside it has them."""
    kinds = kinds_of(path)
    sharded = next((kind for kind in kinds if kind in SHARDED), None)
    if sharded and kinds[0] is Kind.ADAPTER:
        shapes = {tensor.shape for tensor in read_adapter(path).tensors.values()}
        return sharded if (0,) in shapes else Kind.ADAPTER
    return next(iter(kinds), None)


def reader_of(path: Path, tag: str | None, key: str | None) -> tuple[Kind, Reader]:
    """The kind and the reader of a trainer's state. `tag`: which checkpoint of DeepSpeed. `key`: of
    the model, in a state that contains several. Raises UserError for a tag in a folder of another
    kind."""
    kinds = kinds_of(path)
    if tag is not None and Kind.ZERO not in kinds:
        raise UserError(
            f"--tag {tag} needs a DeepSpeed checkpoint as SOURCE, and {path} is not one"
        )
    kind = next(kind for kind in kinds if kind in SHARDED)
    readers: dict[Kind, Reader] = {
        Kind.UNIVERSAL: lambda masters: one_model(universal.read_model(path, masters), path, key),
        Kind.ZERO: lambda masters: one_model(zero.read_model(path, tag, masters), path, key),
        Kind.DCP_SAFETENSORS: lambda _: dcp_safetensors.read_model(path, key=key),
        Kind.DCP: lambda _: dcp.read_model(path, key),
        Kind.STATE_DICT: lambda _: model_folder.read_model(path, key),
    }
    return kind, readers[kind]
