"""Answers of `torch.cuda` for a device that does not exist. Import it after `build.load`.

Streams and events do nothing: nothing runs. What would make the host wait for the device calls
`waits.on_wait`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

DEVICE = torch.device("cuda", 0)
MEMORY = 80 << 30  # bytes
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132
)


class Waits:
    """Receives every wait of the host for the GPU."""

    def __init__(self) -> None:
        self.on_wait: Callable[[str], None] = lambda reason: None


waits = Waits()


class Stream:
    device_type, device_index, stream_id, device = 1, 0, 0, DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Event:
        return Event()

    def synchronize(self) -> None:
        waits.on_wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None:
        waits.on_wait("event.synchronize")

    def elapsed_time(self, end: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True


def pretend() -> None:
    """Replace what asks the driver, for the rest of this process."""
    stream = Stream()
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 8,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": PROPERTIES,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_stats": collections.defaultdict(int),
        **dict.fromkeys(("_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all")),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), 0),
        **dict.fromkeys(("max_memory_reserved", "reset_peak_memory_stats", "empty_cache"), 0),
        **dict.fromkeys(("reset_max_memory_allocated", "reset_max_memory_cached"), 0),
        **dict.fromkeys(("memory_cached", "max_memory_cached", "set_rng_state"), 0),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.synchronize = lambda *_: waits.on_wait("cuda.synchronize")
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = Stream, Event, _in_stream
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    nn.Module.to = _move_if_elsewhere


@contextmanager
def _in_stream(stream: Any) -> Iterator[None]:
    yield


_move = nn.Module.to


def _move_if_elsewhere(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """`nn.Module.to`, which fails for fake parameters even if they are there already."""
    tensors = [*module.parameters(), *module.buffers()]
    if arguments == (DEVICE,) and all(tensor.device == DEVICE for tensor in tensors):
        return module
    return _move(module, *arguments, **options)
