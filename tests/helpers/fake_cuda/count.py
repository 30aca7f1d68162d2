"""Fake tensors that record what a step sends to other ranks, and where the host waits."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from launcher.memory import mem_tracker
from launcher.memory.mem_tracker import FakeTensors
from tests.helpers.fake_cuda.device import waits

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
WRAPPERS = ("wrapped_fn", "wrapper")
WATCHER = mem_tracker.__file__
SHOWN = ("/launcher/", "/deepspeed/", "/_fully_shard/", "/transformers/", "/bitsandbytes/")

# Operations of torch.distributed → their names here, and which of their arguments has the size of
# the full message: that of the complete tensor, not of one rank's part.
COLLECTIVES = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    "alltoall_": ("all-to-all", 0),
    "alltoall_base_": ("all-to-all", 0),
    "barrier": ("barrier", 0),
}


class Message(NamedTuple):
    """A collective operation."""

    phase: str  # forward N and backward N of micro-batch N, or step
    kind: str
    dtype: str
    elements: int  # of the complete tensor
    ranks: int  # in its group
    device: str


@dataclass
class Record:
    """What one optimizer step did."""

    messages: list[Message] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)  # reason @ innermost functions → how often
    phase: str = "forward 1"


class CountingTensors(FakeTensors):
    """`FakeTensors` that write to `record`, if there is one.

    A value that says whether something is wrong reads as False, so that no step is skipped: the
    result of `any`, and flags of uint8 (DeepSpeed's overflow).
    """

    avoid_device_init = True  # torch.tensor(…, device=cuda) is built on the CPU and copied

    def __init__(self) -> None:
        super().__init__()
        self.record: Record | None = None
        self._flags: WeakSet[torch.Tensor] = WeakSet()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.record is not None:
            if reason := _wait(func, args, kwargs or {}):
                self._on_wait(reason)
            if func.namespace == "c10d":
                self.record.messages.append(_message(self.record.phase, func, args))
        if func in READS[:2] and (args[0].dtype == torch.uint8 or id(args[0]) in self._flag_ids()):
            return 0 if func is READS[0] else False
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func.overloadpacket is aten.any:
            self._flags.add(result)
        return result

    def _flag_ids(self) -> set[int]:
        return {id(flag) for flag in self._flags}

    @contextmanager
    def recording(self, record: Record) -> Iterator[None]:
        """Write what happens inside to `record`."""
        self.record, waits.on_wait = record, self._on_wait
        try:
            yield
        finally:
            self.record, waits.on_wait = None, lambda reason: None

    def _on_wait(self, reason: str) -> None:
        assert self.record is not None
        self.record.waits[f"{self.record.phase}: {reason} @ {_where()}"] += 1


def _wait(func: OpOverload, args: Any, kwargs: Any) -> str | None:
    """Why the host waits for the device in this operation; None: it does not."""
    if func in READS:
        is_read = isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        return "read of a value" if is_read else None
    if func is aten._to_copy.default:
        source, target = args[0].device, kwargs.get("device") or args[0].device
        waited = not kwargs.get("non_blocking")
    elif func is aten.copy_.default:
        source, target = args[1].device, args[0].device
        waited = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    else:
        return None
    kinds = source.type, torch.device(target).type
    return f"copy {kinds[0]} → {kinds[1]}" if waited and set(kinds) == {"cpu", "cuda"} else None


def _message(phase: str, func: OpOverload, args: Any) -> Message:
    name = func.overloadpacket.__name__
    kind, position = COLLECTIVES[name]
    tensors = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, torch.Tensor)]
    group = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject))
    return Message(
        phase,
        kind,
        str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        sum(tensor.numel() for tensor in tensors),
        dist.ProcessGroup.unbox(group).size(),
        tensors[0].device.type if tensors else "",
    )


def _where() -> str:
    """The innermost functions of the code that matters."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe()
    while frame and len(found) < 2:
        code = frame.f_code
        is_shown = any(part in code.co_filename for part in SHOWN) and code.co_filename != WATCHER
        if is_shown and code.co_name not in WRAPPERS and not code.co_name.startswith("<"):
            found.append(f"{Path(code.co_filename).stem}.{code.co_name}")
        frame = frame.f_back
    return " < ".join(found)
