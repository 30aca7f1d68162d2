"""The parts that learn, put together: method, then strategy (shards), optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.learner import Learner
from launcher.config import Config
from launcher.distributed.process_group import Place
from launcher.flops import Flops, counted
from launcher.method import build_method
from launcher.method.base import Method
from launcher.method.fused import fuse_adapters
from launcher.method.trained import describe
from launcher.model.compiled import compile_layers
from launcher.model.head import chunk_loss
from launcher.model.kernels import use_kernels
from launcher.model.load import Weights, build_model
from launcher.model.noise import add_noise
from launcher.model.recompute import recompute_activations
from launcher.optimizer import build_optimizer, state_dtype
from launcher.precision import precision_of
from launcher.scheduler import build_scheduler
from launcher.strategy import Strategy, build_strategy
from launcher.watch import Watch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """A model that can be trained."""

    method: Method
    model: nn.Module  # as the method made it, without the strategy's wrapper
    strategy: Strategy  # set up, with its optimizer
    flops: Flops | None  # of a step; None: not known of this model


def build_learner(
    config: Config, folder: Path, place: Place, data: str, total_steps: int, say: Say
) -> Learner:
    """What a run trains. `data` is the fingerprint of the rows."""
    source, training = config.model, config.training
    compute = precision_of(config.precision).compute
    model, weights = build_model(source, folder, training.seed, compute, config.data.packing)
    build = partial(new_strategy, config, place)
    parts = assemble(config, model, weights, build, place.device, say)
    torch.manual_seed(training.seed + place.rank)  # dropout differs from rank to rank
    about = {
        "base": {"name_or_path": source.name_or_path, "revision": source.revision},
        "data": data,
        "ranks": place.world_size,
        "strategy": config.strategy.name,
    }
    scheduler = build_scheduler(config.scheduler, parts.strategy.optimizer, total_steps)
    group = dist.new_group(backend="gloo")
    watch = Watch(training.early_stopping_patience, training.early_stopping_threshold)
    changing = (parts.strategy, parts.method, parts.model, scheduler)
    return Learner(*changing, place, group, about, watch, parts.flops)


def new_strategy(config: Config, place: Place) -> Strategy:
    precision = precision_of(config.precision)
    return build_strategy(config.strategy, config.training, place, precision)


def assemble(
    config: Config,
    model: nn.Module,
    weights: Weights | None,
    new_strategy: Callable[[], Strategy],
    device: torch.device,
    say: Say,
) -> Parts:
    """Make `model` ready to be trained, in this order: what computes, what is trained, what is kept
    for backward, shards, optimizer. `say` hears what is done."""
    training, precision = config.training, precision_of(config.precision)
    say(f"kernels: {use_kernels(model, training.kernels)}")
    method = build_method(config.method)
    model = method.prepare(model, training.seed, weights, device)
    fuse_adapters(model)
    if done := method.describe():
        say(f"base: {done}")
    say(f"method: {config.method.name}: {describe(model, precision.master, precision.compute)}")
    flops = counted(model, say)
    add_noise(model, training.neftune_alpha)
    say(f"activations: {recompute_activations(model, training.activation_checkpointing)}")
    if training.compile != "off":
        compile_layers(model)
    say(f"loss: {chunk_loss(model, training.loss)}")
    strategy = new_strategy()
    build = partial(build_optimizer, config.optimizer, rate=method.rate)
    strategy.setup(model, weights, build)
    say(f"loading: {weights.describe() if weights else 'this rank has read the whole model'}")
    say(f"strategy: {strategy.describe()}")
    say(f"precision: {precision.table(state_dtype(config.optimizer))}")
    return Parts(method, model, strategy, flops)
