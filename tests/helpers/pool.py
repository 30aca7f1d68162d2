"""A pool of gloo ranks: start processes once, run functions on them for a second each."""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 120
PRELOADED = ["tests.helpers.parts", "deepspeed"]


class RankPool:
    """`run(world, function, *args)` calls `function(place, *args)` on `world` ranks of one process
    group and returns their results in order of rank. Functions are module-level: they travel by
    name."""

    def __init__(self, size: int, method: str = "spawn") -> None:
        """`method="forkserver"`: after the first such pool one starts in no time, for ranks that
        are going to die."""
        context = multiprocessing.get_context(method)
        multiprocessing.set_forkserver_preload(PRELOADED)
        self._scratch = tempfile.TemporaryDirectory(prefix="shardway-ranks-")
        self._runs = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, **options: Any
    ) -> list[Any]:
        self._runs += 1
        store = str(Path(self._scratch.name) / f"store-{self._runs}")
        for pipe in self._pipes[:world]:
            pipe.send((functools.partial(function, **options), args, world, store))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(PATIENCE_SECONDS):
                failures.append(f"rank {rank} gave no answer in {PATIENCE_SECONDS} s")
                continue
            try:
                fine, answer = pipe.recv()
            except EOFError:
                fine, answer = False, "died"
            results.append(answer)
            if not fine:
                failures.append(f"rank {rank}:\n{answer}")
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
        self._scratch.cleanup()


def _serve(pipe: Connection, rank: int) -> None:
    import torch

    torch.set_num_threads(1)
    # Half a million objects, which else every collection would walk through, half a second long.
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while (task := pipe.recv()) is not None:
        function, args, world, store = task
        try:
            pipe.send((True, _in_group(rank, world, store, function, args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # taking all modules apart would take seconds


def _in_group(rank: int, world: int, store: str, function: Callable[..., Any], args: Any) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from launcher.distributed.process_group import Place

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world
        )
        dist.barrier()  # a rank that is done at once would hang up on one that still connects
        return function(Place(rank, rank, world, world, torch.device("cpu")), *args)
    finally:
        _forget_deepspeed()
        _clear_sharding_prop_cache()  # it keeps meshes, which keep groups
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.distributed_c10d._world.group_count = 0  # a start that failed has counted itself
        gc.collect()  # groups in cycles keep their sockets: hundreds in a session


def _forget_deepspeed() -> None:
    """It keeps engines by hooks in autograd, which Python cannot see, and groups that are gone."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import groups

    # Not isinstance, which asks weak references to what is gone.
    for engine in [each for each in gc.get_objects() if type(each) is DeepSpeedEngine]:
        if vars(engine):  # not seen before
            engine.destroy()
            for held in (*engine.parameters(), engine.optimizer, *engine.modules()):
                vars(held).clear()
    comm.cdb = None
    groups._release_process_group_references(None)
    # Its numbers of modules and parameters must be alike on all ranks.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    partition_parameters.Init.param_id = 0
