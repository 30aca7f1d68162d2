"""A dry run: two steps on fake tensors, as rank 0 of ranks that do not exist.

    python -m launcher.memory.dry_run CONFIG NODES NPROC_PER_NODE

The last line of its output is JSON: the fields of MemoryUsage, or `refused` with the reason. It
needs its own process, because it creates a process group that sends nothing and patches DeepSpeed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher.config import Config, store
from launcher.config.schema.method import LoraConfig, MethodConfig
from launcher.config.schema.strategy import ZeroConfig
from launcher.data.collate import collate, padded_length
from launcher.data.loader import StepBatch
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.extended_model import padded_rows
from launcher.folders.model import model_folder
from launcher.memory import MemoryUsage, load_and_save
from launcher.memory.fake_weights import FakeWeights, make_parameters_fake
from launcher.memory.mem_tracker import FakeTensors, MemTracker, bytes_of
from launcher.method import METHODS
from launcher.method.base import Method
from launcher.method.lora import Lora
from launcher.method.vocabulary import train_vocabulary
from launcher.model.load import Weights, model_on_meta
from launcher.strategy import StepResult, Strategy
from launcher.strategy.optimizer_state import optimizer_tensors
from launcher.strategy.precision import precision_of
from launcher.training.build import AssembledModel, assemble, new_strategy
from launcher.training.loop import train_step

STEPS = 2  # the first one creates the optimizer state
MAX_MICRO_BATCHES = 2  # in the second one, the gradients of the first already exist


class PhaseRecorder:
    """Wraps a strategy for `train_step`: sets the phase of `tracker`, and records the memory before
    the first backward and after the last one."""

    def __init__(self, strategy: Strategy, tracker: MemTracker) -> None:
        self._strategy, self._tracker = strategy, tracker
        self.bytes_after_forward = 0  # before the first backward of the step
        self.host_bytes = 0  # in host memory, after the last backward

    @property
    def model(self) -> nn.Module:
        return self._strategy.model

    def set_last_micro_batch(self, last: bool) -> None:
        self._tracker.phase = "forward"
        self._strategy.set_last_micro_batch(last)

    def backward(self, loss: torch.Tensor) -> None:
        self._tracker.phase = "backward"
        now = self._tracker.current + self._tracker.ahead()
        self.bytes_after_forward = self.bytes_after_forward or now
        self._strategy.backward(loss)
        self.host_bytes = self._tracker.host_bytes()

    def step(self, max_norm: float) -> StepResult:
        self._tracker.phase = "optimizer step"
        return self._strategy.step(max_norm)


def main() -> None:
    """Print the result of `dry_run` as JSON."""
    file, nodes, nproc_per_node = sys.argv[1:]
    try:
        usage = dry_run(store.load(Path(file)), int(nodes), int(nproc_per_node))
        result = json.dumps(dataclasses.asdict(usage))
    except UserError as error:
        result = json.dumps({"refused": str(error)})
    print(f"\n{result}")


def dry_run(config: Config, nodes: int, nproc_per_node: int) -> MemoryUsage:
    """The memory of rank 0, which has the largest shards. Raises UserError for a run that cannot
    be planned."""
    rank_info = join_fake_ranks(nodes, nproc_per_node)
    precision = precision_of(config.precision)
    with patched_deepspeed(config):
        gc.freeze()  # DeepSpeed collects garbage, and need not look at what was imported
        model = fake_model(config)
        reads_all = load_and_save.reads_whole_model(config, model)
        export = load_and_save.export_bytes(config, model)
        strategy, tracker = new_strategy(config, rank_info), MemTracker()
        with FakeTensors(), tracker.track():
            make_parameters_fake(model)
            weights = Weights(FakeWeights(model, precision.compute), model)
            usage = measure(config, model, weights, lambda: strategy, rank_info, tracker)
    # The parameters are those of `model`, which adapters have joined and the strategy has sharded.
    loading = load_and_save.whole_model_bytes(config, model) if reads_all else 0
    return dataclasses.replace(usage, loading=loading, export=export)


def join_fake_ranks(nodes: int, nproc_per_node: int) -> RankInfo:
    """Become rank 0 of a process group whose other ranks do not exist."""
    ranks = nodes * nproc_per_node
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(nproc_per_node)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return RankInfo(0, 0, ranks, nproc_per_node, torch.device("cpu"))


def fake_model(config: Config) -> Any:
    """The model of `config` with its parameters on meta. Raises UserError if it cannot be built."""
    source, precision = config.model, precision_of(config.precision)
    code = source.trust_remote_code
    folder = model_folder(source.name_or_path, source.revision, code, patterns=("config.json",))
    model = model_on_meta(source, folder, precision.compute, config.data.packing)
    if source.add_tokens:  # as if the tokenizer had none of them
        rows = padded_rows(model.get_input_embeddings().num_embeddings + len(source.add_tokens))
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def build_assembled(
    config: Config,
    model: nn.Module,
    weights: Weights,
    new_strategy: Callable[[], Strategy],
    rank_info: RankInfo,
) -> tuple[Config, AssembledModel]:
    """The model, ready for training, and `config` with the method that new tokens imply."""
    keep_tie = bool(config.model.add_tokens)
    if keep_tie:
        config = dataclasses.replace(config, method=train_vocabulary(config.method, model))
    method = _build_method(config.method, keep_tie)
    device = rank_info.device
    return config, assemble(config, model, weights, method, new_strategy, device, lambda line: None)


def measure(
    config: Config,
    model: nn.Module,
    weights: Weights,
    new_strategy: Callable[[], Strategy],
    rank_info: RankInfo,
    tracker: MemTracker,
) -> MemoryUsage:
    """Build the model, train `STEPS` steps and return the memory that `tracker` counts. Also works
    with real tensors."""
    config, assembled = build_assembled(config, model, weights, new_strategy, rank_info)
    device, training, strategy = rank_info.device, config.training, assembled.strategy
    if config.strategy.steps_on_cpu or config.strategy.parameters_on_cpu:
        tracker.exclude_host_tensors(strategy.host_tensors)  # loading used host memory
    step_batch = longest_step_batch(config, rank_info.world_size)
    targets = int(step_batch.target_tokens) * rank_info.world_size
    for _ in range(STEPS):
        before_step, recorder = tracker.current, PhaseRecorder(strategy, tracker)
        train_step(
            cast(Strategy, recorder),
            step_batch,
            targets,
            training.max_grad_norm,
            device,
            training.label_smoothing,
        )
    optimizer = bytes_of(optimizer_tensors(strategy.optimizer))
    weights_bytes, peak, phase = tracker.current - optimizer, tracker.peak, tracker.peak_phase
    return MemoryUsage(
        weights=weights_bytes,
        optimizer=optimizer,
        activations=recorder.bytes_after_forward - before_step,
        peak=peak,
        phase=phase,
        host=recorder.host_bytes,
        warning=strategy.warning(),
        **load_and_save.save_bytes(
            config.checkpoint, strategy, assembled.method.is_adapter, rank_info.world_size
        ),
    )


def longest_step_batch(config: Config, ranks: int) -> StepBatch:
    """A rank's share of a step in which all rows have the maximum length and all tokens are
    targets."""
    training, data = config.training, config.data
    rows = training.micro_batch_size
    length = padded_length(data.max_length, data.pad_to_multiple_of)
    accumulation_steps = max(1, training.global_batch_size // (ranks * rows))
    row = (np.zeros(length, np.int32), np.ones(length, np.bool_))
    batch = collate([[row] for _ in range(rows)], 1, 0, data.packing)
    micro_batches = min(accumulation_steps, MAX_MICRO_BATCHES)
    count = torch.tensor(micro_batches * rows * length)
    return StepBatch([batch] * micro_batches, count, count, count, count, count)


def _build_method(config: MethodConfig, keep_tie: bool) -> Method:
    """The method of `config`. The values of an existing adapter are not loaded: its settings
    contain the shapes."""
    method = METHODS[config.name]
    if isinstance(config, LoraConfig):
        assert issubclass(method, Lora)
        return method(config, load_adapter=False, keep_tie=keep_tie)
    return method(config)


@contextmanager
def patched_deepspeed(config: Config) -> Iterator[None]:
    """Inside, if DeepSpeed trains: without checks that need an answer of the other ranks, or the
    features of a GPU, and without compiling."""
    if not isinstance(config.strategy, ZeroConfig):
        yield
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer, compiler
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero import stage3, stage_1_and_2, utils

    for module in (utils, coordinator):
        module.assert_ints_same_as_other_ranks = lambda ints: None
    for module in (stage3, stage_1_and_2, bf16_optimizer):  # so that no step is skipped
        module.is_invalid_grad_norm = lambda norm: False
    for engine in (stage3.DeepSpeedZeroOptimizer_Stage3, stage_1_and_2.DeepSpeedZeroOptimizer):
        engine.has_overflow = lambda *_, **__: False
    get_accelerator().is_fp16_supported = lambda: True
    # Of an optimizer that no run has; importing torch's compiler for it takes seconds.
    compiler.compile = lambda *_, **__: lambda function: function
    # The engine moves the model to the device where it already is, and torch cannot swap fake
    # parameters.
    move = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
