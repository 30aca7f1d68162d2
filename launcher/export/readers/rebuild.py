"""What a checkpoint's pickle may name, and what is made of it: data, or objects that do nothing.

Everything else is refused before anything of it is imported.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.readers.strided import Strided, is_contiguous, reach
from launcher.export.tensor import Tensor
from launcher.export.tensor.stored import Stored, run_pieces

Places = dict[str, tuple[int, int]]  # a storage's key → its bytes in the file: (begin, length)


class Inert:
    """Stands for an object of a class that is not needed. Its attributes are kept, or its state."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


class Sealed:
    """What a pickle may pass on but not change: else it could make a tensor of any file."""

    def __setstate__(self, _: Any) -> None:
        raise UserError("a pickle sets the state of a tensor, which no checkpoint does")


@dataclass(frozen=True)
class Storage(Sealed):
    """A storage in a file."""

    path: Path
    key: str
    dtype: torch.dtype  # uint8 for an untyped one
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Reference(Sealed):
    """A tensor, until its pickle has been read."""

    tensor: Tensor


def find_class(path: Path, module: str, name: str) -> Any:
    """What stands for `module.name` in a pickle. Raises UserError when it is not known."""
    if (module, name) in KNOWN:
        return KNOWN[module, name]
    if module == "torch":
        kind = name.removesuffix("Storage")
        if name.endswith("Storage") and kind in STORAGES:
            return STORAGES[kind]
        if isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
    raise UserError(
        f"{path} names {module}.{name}, which no checkpoint needs; nothing of it was executed, "
        "save the weights alone"
    )


def storage(path: Path, places: Places, pid: Any) -> Storage:
    """The storage that a persistent id ("storage", type, key, device, elements) names."""
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
        raise UserError(f"{path} is damaged: it refers to {pid!r:.80}")
    _, dtype, key, _, count = pid
    if key not in places:
        raise UserError(f"{path} holds no data of storage {key}: it is damaged or was cut short")
    begin, nbytes = places[key]
    if nbytes < count * dtype.itemsize:
        raise UserError(
            f"{path}: storage {key} has {nbytes} bytes, not {count * dtype.itemsize}: it is damaged"
        )
    return Storage(path, key, dtype, begin, nbytes)


def resolved(content: Any, seen: dict[int, Any] | None = None) -> Any:
    """`content` with tensors in place of references, in dicts, lists and tuples of any depth."""
    seen = {} if seen is None else seen
    if isinstance(content, Reference):
        return content.tensor
    if id(content) in seen or not isinstance(content, dict | list | tuple):
        return seen.get(id(content), content)
    seen[id(content)] = content
    if isinstance(content, tuple):
        seen[id(content)] = tuple(resolved(each, seen) for each in content)
        return seen[id(content)]
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        content[key] = resolved(value, seen)
    return content


def _tensor(
    of: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
) -> Reference:
    if not (isinstance(of, Storage) and isinstance(dtype, torch.dtype)):
        raise UserError("a pickle makes a tensor of something else than a storage: it is damaged")
    shape, strides = tuple(shape), tuple(strides)
    width = dtype.itemsize
    whole = all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides))
    if not whole or (offset + reach(shape, strides)) * width > of.nbytes:
        raise UserError(
            f"{of.path} is damaged: a tensor of {list(shape)} from element {offset} does not lie "
            f"in storage {of.key} of {of.nbytes} bytes"
        )
    begin = of.begin + offset * width
    if reach(shape, strides) and not is_contiguous(shape, strides):
        return Reference(Strided(of.key, dtype, shape, of.path, begin, strides))
    pieces = run_pieces(of.path, begin, 0, math.prod(shape), shape, width)
    return Reference(Stored(of.key, dtype, shape, tuple(pieces)))


def _tensor_v2(of: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Reference:
    return _tensor(of, offset, shape, strides, of.dtype)


def _tensor_v3(
    of: Storage, offset: int, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> Reference:
    """Types that have no typed storage: the dtype stands beside an untyped one."""
    return _tensor(of, offset, shape, strides, dtype)


def _first(value: Any, *_: Any) -> Any:
    """A parameter is its tensor, an enum its number."""
    return value


def _from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor with attributes of its own, which are dropped (ZeRO-3's masters carry a ds_id)."""
    return function(*arguments)


def _encode(text: str, _: str) -> bytes:
    """How protocol 2 writes bytes: as latin-1 text."""
    return text.encode("latin-1")


STORAGES: dict[str, torch.dtype] = {
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
}
KNOWN: dict[tuple[str, str], Any] = {
    **{("builtins", each.__name__): each for each in (set, frozenset, dict, list, int, float)},
    **{("__builtin__", each.__name__): each for each in (set, frozenset, dict, list, int, float)},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): Inert,
    ("torch", "device"): Inert,
    ("torch.serialization", "_get_layout"): Inert,
    ("torch.nn.parameter", "Parameter"): Inert,
    ("torch.nn.parameter", "Buffer"): Inert,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _first,
}
for _module, *_names in (
    ("argparse", "Namespace"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", "OffloadDeviceEnum"),
    ("numpy", "dtype", "ndarray"),
    ("numpy.core.multiarray", "scalar", "_reconstruct"),
    ("numpy._core.multiarray", "scalar", "_reconstruct"),
    ("pathlib", "PosixPath", "Path"),
    ("pathlib._local", "PosixPath", "Path"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata", "ChunkStorageMetadata",
     "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
     "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
):  # fmt: skip
    KNOWN |= {(_module, _name): Inert for _name in _names}
