"""The classes and functions that a checkpoint's pickle may name, and what replaces them.

Each is replaced by data, or by an object without behavior. Any other name is refused before
anything is imported.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders.brief import brief
from launcher.io.readers.strided import Strided, extent, is_contiguous
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Stored, run_pieces

ByteRange = tuple[int, int]  # (begin, length) in the file
ByteRanges = dict[str, ByteRange]  # by the key of a storage, or the name of an archive's entry


STATE_DICT = "torch.save(model.state_dict(), FILE)"
# Names in a pickle that are not read: pattern → what they are, and what to do.
WAYS_OUT = {
    r"torch\._utils\._rebuild_sparse": "a sparse tensor → save tensor.to_dense() in its place",
    r"torch\._utils\._rebuild_qtensor": "a quantized tensor → save its dequantize()",
    r"torch\._utils\._rebuild_meta": (
        f"a tensor without values (on the device meta) → {STATE_DICT} of a model that is loaded"
    ),
    r"torch\.nested\.": "a nested tensor → save its parts as tensors of their own",
    r"torch\._utils\._rebuild_wrapper_subclass|torch\.distributed\.|torchao\.": (
        "a tensor of a class of its own, such as a rank's shard (DTensor) or a quantized one → for "
        "shards, save get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)); "
        "otherwise tensor.dequantize() in its place"
    ),
    r"torch\.Complex": "complex numbers, which no model of a known class has → the weights alone",
}
OTHER_CLASS = (
    "tensors by name are read, and no modules, functions or settings of a trainer → "
    f"{STATE_DICT} in the program that saved it"
)
MAX_DIMS, MAX_SIZE = 64, 1 << 48
# A view may repeat the elements of its storage this many times, or be this small in bytes.
MAX_EXPANSION, MIN_EXPANDED = 1_000, 1 << 24


def is_size(value: Any) -> bool:
    """Whether it is a number of elements or bytes that a file can have."""
    return type(value) is int and 0 <= value < MAX_SIZE


def is_shape(value: Any) -> bool:
    """Whether it is a tuple or a list of sizes that a tensor can have."""
    return (
        isinstance(value, tuple | list)
        and len(value) <= MAX_DIMS
        and all(map(is_size, value))
        and math.prod(size for size in value if size) < MAX_SIZE
    )


class Inert:
    """Replaces an object of a class that is not needed. Keeps its attributes, or its state."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # Not copied: a pickle can give the same state to many objects.
        self.__dict__ = state if isinstance(state, dict) else {"state": state}


class Sealed:
    """An object that a pickle can pass on but not change: otherwise it could make a tensor of any
    file."""

    def __setstate__(self, _: Any) -> None:
        raise UserError("a pickle sets the state of a tensor, which no checkpoint does")


@dataclass(frozen=True)
class Storage(Sealed):
    """A storage in a file."""

    path: Path
    key: str
    dtype: torch.dtype  # uint8 for an untyped storage
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Reference(Sealed):
    """Replaces a tensor until its pickle has been read."""

    tensor: Tensor


def find_class(path: Path, module: str, name: str) -> Any:
    """What replaces `module.name` in the pickle of `path`. Raises UserError if the name is not
    known."""
    if (module, name) in KNOWN_NAMES:
        return KNOWN_NAMES[module, name]
    if module == "torch":
        storage_type = name.removesuffix("Storage")
        if name.endswith("Storage") and storage_type in STORAGES:
            return STORAGES[storage_type]
        if isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
    found = (out for pattern, out in WAYS_OUT.items() if re.match(pattern, f"{module}.{name}"))
    raise UserError(
        f"{path} names {module}.{name}, which no checkpoint needs: {next(found, OTHER_CLASS)} "
        "(nothing of it was executed)"
    )


def parse_storage(path: Path, pid: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) of the storage that a persistent id names.

    It is ("storage", type, key, device, elements). Files of torch before 1.6 add None, or what
    the storage is a part of.
    """
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
        raise UserError(f"{path} is damaged: it refers to {brief(pid)}")
    _, dtype, key, _, count, *part = pid
    if not (isinstance(dtype, torch.dtype) and isinstance(key, str) and is_size(count)):
        raise UserError(f"{path} is damaged: it refers to a storage {brief(pid[1:])}")
    if part and part[0] is not None:
        raise UserError(f"{path} has a storage that is a part of another: save it with a new torch")
    return dtype, key, count


def find_storage(path: Path, ranges: ByteRanges, pid: Any) -> Storage:
    """The storage that a persistent id names. Raises UserError if the file does not contain all of
    it."""
    dtype, key, count = parse_storage(path, pid)
    if key not in ranges:
        raise UserError(f"{path} contains no data of storage {key}: it is damaged or truncated")
    begin, nbytes = ranges[key]
    if nbytes < count * dtype.itemsize:
        raise UserError(
            f"{path}: storage {key} has {nbytes} bytes, not {count * dtype.itemsize}: it is damaged"
        )
    return Storage(path, key, dtype, begin, nbytes)


def resolve_references(content: Any, resolved: dict[int, Any] | None = None) -> Any:
    """`content` with tensors in place of references, in dicts, lists and tuples of any depth.

    `resolved`: by id, the containers that were already visited.
    """
    resolved = {} if resolved is None else resolved
    if isinstance(content, Reference):
        return content.tensor
    if id(content) in resolved or not isinstance(content, dict | list | tuple):
        return resolved.get(id(content), content)
    resolved[id(content)] = content
    if isinstance(content, tuple):
        resolved[id(content)] = tuple(resolve_references(value, resolved) for value in content)
        return resolved[id(content)]
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        content[key] = resolve_references(value, resolved)
    return content


def _rebuild_tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
) -> Reference:
    if not (isinstance(storage, Storage) and isinstance(dtype, torch.dtype)):
        raise UserError("a pickle makes a tensor of something that is not a storage: it is damaged")
    if not (is_size(offset) and is_shape(shape) and is_shape(strides)):
        raise UserError(f"{storage.path} is damaged: a tensor has the shape {brief(shape)}")
    shape, strides = tuple(shape), tuple(strides)
    width = dtype.itemsize
    if (offset + extent(shape, strides)) * width > storage.nbytes:
        raise UserError(
            f"{storage.path} is damaged: a tensor of {list(shape)} from element {offset} does not "
            f"fit in storage {storage.key} of {storage.nbytes} bytes"
        )
    if math.prod(shape) * width > max(MIN_EXPANDED, MAX_EXPANSION * storage.nbytes):
        raise UserError(
            f"{storage.path} contains a view of {list(shape)} elements in a storage of "
            f"{storage.nbytes} bytes; save a contiguous copy of it"
        )
    begin = storage.begin + offset * width
    if extent(shape, strides) and not is_contiguous(shape, strides):
        return Reference(Strided(storage.key, dtype, shape, storage.path, begin, strides))
    pieces = run_pieces(storage.path, begin, 0, math.prod(shape), shape, width)
    return Reference(Stored(storage.key, dtype, shape, tuple(pieces)))


def _rebuild_tensor_v2(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _: Any = None,
    __: Any = None,
    flags: Any = None,
) -> Reference:
    """`flags`: bits of a lazy view, whose values are others than those in the storage."""
    if flags:
        raise UserError(
            f"{storage.path} contains a view that is negated or conjugated ({brief(flags)}) → save "
            "tensor.resolve_neg().resolve_conj() in its place"
        )
    return _rebuild_tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _: Any,
    __: Any,
    dtype: torch.dtype,
    *___: Any,
) -> Reference:
    """For types without a typed storage: the dtype is saved beside an untyped storage."""
    return _rebuild_tensor(storage, offset, shape, strides, dtype)


def _first_argument(value: Any, *_: Any) -> Any:
    """A parameter becomes its tensor, an enum its number."""
    return value


def _rebuild_from_type(function: Callable[..., Any], _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor with additional attributes, which are dropped (the masters of ZeRO-3 have a
    ds_id)."""
    if function not in (_rebuild_tensor_v2, _rebuild_tensor_v3, _first_argument):
        raise UserError("a pickle makes a tensor in a way that torch does not: it is damaged")
    return function(*arguments)


def _encode(text: str, _: str) -> bytes:
    """Pickle protocol 2 writes bytes as latin-1 text."""
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
BUILTINS = (set, frozenset, dict, list, int, float)
KNOWN_NAMES: dict[tuple[str, str], Any] = {
    **{("builtins", builtin.__name__): builtin for builtin in BUILTINS},
    **{("__builtin__", builtin.__name__): builtin for builtin in BUILTINS},
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
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first_argument,
    ("torch._utils", "_rebuild_parameter_with_state"): _first_argument,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _first_argument,
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
    KNOWN_NAMES |= {(_module, _name): Inert for _name in _names}
