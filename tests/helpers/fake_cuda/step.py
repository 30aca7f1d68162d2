"""Build the training state of a case and train two steps; the second one is recorded."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp_init
import torch.distributed.fsdp._fully_shard._fully_shard as fully_shard
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero import utils as zero_utils
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import launcher.model.bnb_formats
import launcher.strategy.deepspeed
import launcher.strategy.fsdp  # noqa: F401  (imported once, before the forks)
from launcher.config import Config
from launcher.config.rules.rule import World
from launcher.config.rules.table import broken_rules
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from launcher.memory.dry_run import longest_step_batch
from launcher.memory.fake_weights import FakeWeights, make_parameters_fake
from launcher.method import build_method
from launcher.model.load import Weights, model_on_meta
from launcher.strategy import StepResult, Strategy
from launcher.strategy.optimizer_state import optimizer_tensors
from launcher.strategy.precision import precision_of
from launcher.training.build import assemble, new_strategy
from launcher.training.loop import train_step
from tests.helpers.compose import composed
from tests.helpers.fake_cuda import Case, Seen
from tests.helpers.fake_cuda.count import CountingTensors, Record
from tests.helpers.fake_cuda.device import DEVICE
from tests.helpers.fake_cuda.parts import Size, parts_of

WORDS = ("precision=bf16", "data.max_length=128", "training.micro_batch_size=1")
MICRO_BATCHES = 2


class Phases:
    """Wraps a strategy for `train_step`, to tell `record` which phase it is in."""

    def __init__(self, strategy: Strategy, record: Record) -> None:
        self._strategy, self._record = strategy, record
        self._micro_batch = 0

    @property
    def model(self) -> nn.Module:
        return self._strategy.model

    def set_last_micro_batch(self, last: bool) -> None:
        self._micro_batch += 1
        self._record.phase = f"forward {self._micro_batch}"
        self._strategy.set_last_micro_batch(last)

    def backward(self, loss: torch.Tensor) -> None:
        self._record.phase = f"backward {self._micro_batch}"
        self._strategy.backward(loss)

    def step(self, max_norm: float) -> StepResult:
        self._record.phase = "step"
        return self._strategy.step(max_norm)


def see(case: Case) -> Seen:
    """What `case` does; in a process of its own."""
    warnings.simplefilter("ignore")
    try:
        return _see(case)
    except BaseException as error:
        return Seen(error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _see(case: Case) -> Seen:
    rank_info = _join(case)
    config = _config(case)
    precision = precision_of(config.precision)
    model = model_on_meta(config.model, Path(case.model), precision.compute, config.data.packing)
    _unblock(model)
    strategy = new_strategy(config, rank_info)  # its mesh needs real values
    parts: dict[str, Size] = {}

    def strategy_after_method() -> Strategy:
        parts.update(parts_of(model))
        return strategy

    tensors, record = CountingTensors(), Record()
    with tensors:
        make_parameters_fake(model)
        _make_buffers_fake(model)
        weights = Weights(FakeWeights(model, precision.compute), model)
        method = build_method(config.method)
        assembled = assemble(
            config, model, weights, method, strategy_after_method, DEVICE, lambda line: None
        )
        assert assembled.strategy is strategy
        batch = longest_step_batch(config, case.ranks)
        targets = int(batch.target_tokens) * case.ranks
        norm = config.training.max_grad_norm
        if case.trains:
            train_step(strategy, batch, targets, norm, DEVICE)
            with tensors.recording(record):
                train_step(Phases(strategy, record), batch, targets, norm, DEVICE)  # type: ignore[arg-type]
        held, full = _bytes(strategy.model)
    return Seen(
        ranks=case.ranks,
        messages=record.messages,
        waits=dict(record.waits),
        devices=_devices(strategy),
        held_bytes=held,
        full_bytes=full,
        parts=parts,
    )


def _join(case: Case) -> RankInfo:
    """Become a rank of a process group that sends nothing."""
    local = case.rank % case.ranks_per_node
    os.environ |= {"RANK": str(case.rank), "LOCAL_RANK": str(local)}
    os.environ |= {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks_per_node)}
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.ranks)
    return RankInfo(case.rank, local, case.ranks, case.ranks_per_node, DEVICE)


def _config(case: Case) -> Config:
    """The configuration that the command line composes, which no rule refuses."""
    rows = f"training.global_batch_size={MICRO_BATCHES * case.ranks}"
    config = composed(*WORDS, rows, f"model.name_or_path={case.model}", *case.overrides)
    per_node = min(case.ranks, case.ranks_per_node)
    refusals = broken_rules(config, World(case.ranks // per_node, per_node))
    assert all(line.endswith("[model-has-safetensors]") for line in refusals), refusals
    return config


def _unblock(model: nn.Module) -> None:
    """Remove a check that needs an answer of the other ranks, and a move that torch cannot make
    with fake tensors."""
    for module in (zero_utils, coordinator):
        module.assert_ints_same_as_other_ranks = lambda ints: None

    def move(parameters: Iterable[Any], buffers: Iterable[Any], device: torch.device) -> None:
        """FSDP2's: sets the data of a tensor to its copy on `device`."""
        for parameter in parameters:
            if not parameter.is_meta and parameter.device != device:
                moved = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                torch.utils.swap_tensors(parameter, moved)
        left = {id(buffer) for buffer in buffers if buffer.device != device}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if id(buffer) in left:
                    module._buffers[name] = buffer.to(device)

    fsdp_init._move_states_to_device = fully_shard._move_states_to_device = move


def _make_buffers_fake(model: nn.Module) -> None:
    """Buffers are on the CPU, where transformers creates them."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _devices(strategy: Strategy) -> dict[str, list[str]]:
    """The devices of parameters, buffers and the optimizer's state."""
    model = strategy.model
    tensors = {
        "parameters": [getattr(p, "ds_tensor", local_part(p)) for p in model.parameters()],
        "buffers": list(model.buffers()),
        "moments": [state for state in optimizer_tensors(strategy.optimizer) if state.ndim],
    }
    return {name: sorted({each.device.type for each in found}) for name, found in tensors.items()}


def _bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters on this rank, and of the model."""
    held = full = 0
    for parameter in model.parameters():
        local = getattr(parameter, "ds_tensor", None)
        numel = parameter.numel() if local is None else parameter.ds_numel
        local = local_part(parameter) if local is None else local
        held, full = held + local.nbytes, full + numel * local.itemsize
    return held, full
