"""Two steps of a run on fake tensors, as rank 0 of ranks that are not there.

    python -m launcher.memory.trial CONFIG NODES NPROC_PER_NODE

The last line that it prints is JSON: Bytes, or a sentence that says why there are none.
A process of its own: it has a process group that sends nothing, and changes DeepSpeed for good.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher.assembly import assemble, new_strategy
from launcher.config import Config, store
from launcher.data.batch import collate, padded
from launcher.data.loader import Window
from launcher.distributed.process_group import Place
from launcher.errors import UserError
from launcher.loop import train_step
from launcher.memory import Bytes
from launcher.memory.absent import AbsentTensors, as_fakes
from launcher.memory.live import Fakes, Live, bytes_of
from launcher.method.lora import Lora
from launcher.model.folder import model_folder
from launcher.model.load import Weights, model_on_meta
from launcher.precision import precision_of
from launcher.strategy import Strategy
from launcher.strategy.base import moments_of

STEPS = 2  # the first makes the optimizer's state
MICRO_BATCHES = 2  # of a step that has more: the second meets the gradients of the first


class Phases:
    """A strategy that says what is being done, and looks at the memory around backward."""

    def __init__(self, strategy: Strategy, live: Live) -> None:
        self._strategy, self._live = strategy, live
        self.forward = 0  # bytes when the first backward of a step begins
        self.host = 0  # bytes in host memory when the last one is done

    @property
    def model(self) -> Any:
        return self._strategy.model

    def accumulate(self, last: bool) -> None:
        self._live.phase = "forward"
        self._strategy.accumulate(last)

    def backward(self, loss: torch.Tensor) -> None:
        self._live.phase = "backward"
        self.forward = self.forward or self._live.now
        self._strategy.backward(loss)
        self.host = self._live.apart()

    def step(self, max_norm: float) -> Any:
        self._live.phase = "optimizer step"
        return self._strategy.step(max_norm)


def main() -> None:
    file, nodes, per_node = sys.argv[1:]
    told: dict[str, Any]
    try:
        told = dataclasses.asdict(trial(store.load(Path(file)), int(nodes), int(per_node)))
    except UserError as error:
        told = {"refused": str(error)}
    print(f"\n{json.dumps(told)}")


def trial(config: Config, nodes: int, per_node: int) -> Bytes:
    """Raises UserError for what cannot be planned."""
    ranks = nodes * per_node
    place = Place(0, 0, ranks, per_node, torch.device("cpu"))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(per_node)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    _leave_adapter()
    _unblock_deepspeed(config)
    source, precision = config.model, precision_of(config.precision)
    code = source.trust_remote_code
    folder = model_folder(source.name_or_path, source.revision, code, only=("config.json",))
    model = model_on_meta(source, folder, precision.compute, config.data.packing)
    strategy, live = new_strategy(config, place), Live()
    with Fakes(), live.counting():
        as_fakes(model)
        weights: Any = Weights(AbsentTensors(model, precision.compute), model)
        return measure(config, model, weights, lambda: strategy, place, live)


def measure(
    config: Config,
    model: Any,
    weights: Weights,
    new_strategy: Callable[[], Strategy],
    place: Place,
    live: Live,
) -> Bytes:
    """Build and train, and look on. The tensors may be real as well: then it is what they take."""
    parts = assemble(config, model, weights, new_strategy, place.device, lambda line: None)
    strategy = parts.strategy
    if config.strategy.steps_on_cpu or config.strategy.parameters_on_cpu:
        live.begin(strategy.on_host)  # it was loaded into host memory
    window = full_window(config, place.world_size)
    targets = int(window.target_tokens) * place.world_size
    training = config.training
    for _ in range(STEPS):
        between, phases = live.now, Phases(strategy, live)
        watched: Any = phases
        train_step(
            *(watched, window, targets, training.max_grad_norm, place.device),
            training.label_smoothing,
        )
    optimizer = bytes_of(moments_of(strategy.optimizer))
    return Bytes(
        weights=live.now - optimizer,
        optimizer=optimizer,
        activations=phases.forward - between,
        peak=live.peak,
        phase=live.peak_phase,
        host=phases.host,
    )


def full_window(config: Config, ranks: int) -> Window:
    """A rank's share of a step whose rows are as long as they may be, all tokens of them learnt."""
    training, data = config.training, config.data
    rows, length = training.micro_batch_size, padded(data.max_length, data.pad_to_multiple_of)
    steps = max(1, training.global_batch_size // (ranks * rows))
    row: Any = (np.zeros(length, np.int32), np.ones(length, np.bool_))
    batch = collate([[row] for _ in range(rows)], 1, 0, data.packing)
    number = min(steps, MICRO_BATCHES)
    count = torch.tensor(number * rows * length)
    return Window([batch] * number, count, count, count, count, count)


def _leave_adapter() -> None:
    """An adapter to go on from has its shapes by its configuration; its values stay in their
    file."""
    Lora._go_on_from = lambda *_: None  # type: ignore[method-assign]


def _unblock_deepspeed(config: Config) -> None:
    """Ranks that are not there answer nothing, and the CPU of this machine may lack what the GPUs
    have that will train."""
    if not config.strategy.name.startswith("zero"):
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero import stage3, stage_1_and_2, utils

    for module in (utils, coordinator):
        module.assert_ints_same_as_other_ranks = lambda ints: None
    for module in (stage3, stage_1_and_2, bf16_optimizer):  # no step is skipped
        module.is_invalid_grad_norm = lambda norm: False
    for engine in (stage3.DeepSpeedZeroOptimizer_Stage3, stage_1_and_2.DeepSpeedZeroOptimizer):
        engine.has_overflow = lambda *_, **__: False
    get_accelerator().is_fp16_supported = lambda: True
    # The engine moves the model to its device, where it is: torch cannot swap fake parameters.
    torch.nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main()
