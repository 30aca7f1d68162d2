"""A pool of ranks: start processes once, run functions on them for a second each."""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from launcher.errors import UserError

PATIENCE_SECONDS = 300  # a deadline of one run: below pytest's timeout
PATIENCE_AFTER_FAILURE = 30  # for the other ranks, which often wait for the failed one
PRELOADED = ["tests.helpers.parts", "deepspeed"]


class RankPool:
    """`run(world, function, *args)` calls `function(rank_info, *args)` on `world` ranks of one
    process group and returns their results in order of rank. Functions must be module-level: they
    are sent by name.

    If a rank fails, `run` raises AssertionError and kills all ranks, because their state is
    unknown; the next `run` starts new ones. For an expected error there is `message_of_error`."""

    def __init__(
        self,
        size: int,
        method: str = "spawn",
        preloaded: Sequence[str] = PRELOADED,
        device: str = "cpu",
    ) -> None:
        """`method="forkserver"`: every pool after the first starts at once, for ranks that will be
        killed. `preloaded`: modules that ranks import when they start. `device="cuda"`: each rank
        has the GPU of its number."""
        self._size, self._preloaded, self._device = size, list(preloaded), device
        self._context = multiprocessing.get_context(method)
        multiprocessing.set_forkserver_preload(self._preloaded)
        self._scratch = tempfile.TemporaryDirectory(prefix="shardway-ranks-")
        self._runs = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._start()

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, **options: Any
    ) -> list[Any]:
        if not self._processes:
            self._start()
        self._runs += 1
        store = str(Path(self._scratch.name) / f"store-{self._runs}")
        try:
            for pipe in self._pipes[:world]:
                pipe.send((functools.partial(function, **options), args, world, store))
            return self._results(world)
        except BaseException:  # also pytest's timeout: a late answer must not reach the next run
            self._kill()
            raise

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
        self._kill()
        self._scratch.cleanup()

    def _start(self) -> None:
        for rank in range(self._size):
            ours, theirs = self._context.Pipe()
            arguments = (theirs, rank, self._preloaded, self._device)
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # otherwise the pipe stays open after the rank dies
            self._pipes.append(ours)
            self._processes.append(process)

    def _results(self, world: int) -> list[Any]:
        """The results of the ranks. Raises AssertionError if one of them fails, dies or hangs."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:world])}
        start = time.monotonic()
        end = start + PATIENCE_SECONDS
        while waiting and (ready := wait(list(waiting), max(0, end - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    succeeded, results[rank] = False, "died"
                if not succeeded:
                    failures[rank] = f"rank {rank}:\n{results[rank]}"
                    end = min(end, time.monotonic() + PATIENCE_AFTER_FAILURE)
        for rank in waiting.values():
            failures[rank] = f"rank {rank} gave no answer in {time.monotonic() - start:.0f} s"
        assert not failures, "\n".join(failures[rank] for rank in sorted(failures))
        return [results[rank] for rank in range(world)]

    def _kill(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._pipes, self._processes = [], []


def message_of_error(rank_info: Any, function: Callable[..., Any], *args: Any) -> str:
    """The message of the UserError that `function` raises on this rank."""
    try:
        function(rank_info, *args)
    except UserError as error:
        return str(error)
    raise AssertionError(f"{function.__name__} raised no UserError")


def _serve(pipe: Connection, rank: int, preloaded: list[str], device: str) -> None:
    import torch

    torch.set_num_threads(1)
    # Otherwise every collection would scan half a million objects for half a second.
    for name in preloaded:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while (task := pipe.recv()) is not None:
        function, args, world, store = task
        try:
            pipe.send((True, _in_group(rank, world, store, device, function, args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # a regular exit takes seconds


def _in_group(
    rank: int, world: int, store: str, device: str, function: Callable[..., Any], args: Any
) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from launcher.distributed.process_group import RankInfo

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    place = torch.device("cuda", rank) if device == "cuda" else torch.device(device)
    backend, bound = "gloo", None
    if device == "cuda":
        torch.cuda.set_device(place)
        backend, bound = "cpu:gloo,cuda:nccl", place
    try:
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            device_id=bound,
        )
        dist.barrier()  # a rank that finishes early would disconnect one that is still connecting
        return function(RankInfo(rank, rank, world, world, place), *args)
    finally:
        _forget_deepspeed()
        _clear_sharding_prop_cache()  # it keeps meshes, which keep groups
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.distributed_c10d._world.group_count = 0  # a failed start has incremented it
        gc.collect()  # groups in cycles keep their sockets: hundreds in a session
        if device == "cuda":
            torch.cuda.empty_cache()


def _forget_deepspeed() -> None:
    """Autograd hooks that Python cannot see keep engines alive, and DeepSpeed keeps old groups."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed import DeepSpeedEngine
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import groups

    # Not isinstance, which would access dead weak references.
    for engine in [each for each in gc.get_objects() if type(each) is DeepSpeedEngine]:
        if vars(engine):  # not seen before
            engine.destroy()
            for held in (*engine.parameters(), engine.optimizer, *engine.modules()):
                vars(held).clear()
    comm.cdb = None
    groups._release_process_group_references(None)
    # Its numbers of modules and parameters must be equal on all ranks.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    partition_parameters.Init.param_id = 0
