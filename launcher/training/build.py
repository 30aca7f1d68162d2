"""Build the training state: method, then strategy (shards), optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from launcher.config import Config
from launcher.distributed.collectives import in_parts
from launcher.distributed.process_group import RankInfo
from launcher.folders.checkpoint import TRAINED_CLASS
from launcher.io.model_class import places_of
from launcher.method import build_method
from launcher.method.base import Method
from launcher.method.expert_lora import fuse_experts
from launcher.method.fused_lora import fuse_adapters
from launcher.method.summary import describe_parameters
from launcher.method.vocabulary import describe_vocabulary, train_vocabulary
from launcher.model.activation_checkpointing import checkpoint_activations
from launcher.model.attention import describe_attention
from launcher.model.chunked_loss import use_chunked_loss
from launcher.model.compile import compile_layers
from launcher.model.liger import use_kernels
from launcher.model.load import Weights, build_model
from launcher.model.neftune import add_noise
from launcher.model.recurrent import describe_kernels, separate_documents
from launcher.model.router_loss import RouterLoss, find_router_loss
from launcher.strategy import Strategy, build_strategy
from launcher.strategy.precision import precision_of
from launcher.training.early_stopping import EarlyStopping
from launcher.training.flops import Flops, may_have_peak, try_count_flops
from launcher.training.optimizer import build_optimizer, state_dtype
from launcher.training.scheduler import build_scheduler
from launcher.training.spikes import Spikes
from launcher.training.state import TrainState

Log = Callable[[str], None]


@dataclass(frozen=True)
class AssembledModel:
    """A model that is ready to be trained."""

    method: Method
    model: nn.Module  # as the method prepared it, without the strategy's wrapper
    strategy: Strategy  # after `setup`, with its optimizer
    flops: Flops | None  # of the model; None: not known, or not needed
    router_loss: RouterLoss | None  # that is trained on; None: off


def build_train_state(
    config: Config, folder: Path, rank_info: RankInfo, data: str, total_steps: int, log: Log
) -> TrainState:
    """The state of a new run, for the model in `folder`. Collective.

    `data` is the fingerprint of the rows. `log` receives log lines. Raises UserError if the model
    cannot be built, or if the settings do not fit it.
    """
    base, training = config.model, config.training
    compute = precision_of(config.precision).compute
    model, weights = build_model(
        base, folder, training.seed, compute, config.data.packing, in_parts
    )
    model_class = type(model).__name__  # FSDP2 makes another one of it
    if places := places_of(model):
        log(
            f"model: {places.inner_class}, a part of {places.outer_class}; an export copies the "
            f"rest from the base: {', '.join(places.roots)}"
        )
    log(f"attention: {describe_attention(base.attention, model)}")
    if recurrent := describe_kernels(model):
        log(f"recurrent layers: {recurrent}")
    if config.data.packing and (separated := separate_documents(model)):
        log(f"packing: {separated}")
    if base.add_tokens:
        config = replace(config, method=train_vocabulary(config.method, model))
    strategy_factory = partial(new_strategy, config, rank_info)
    method = build_method(config.method, keep_tie=bool(base.add_tokens))
    assembled = assemble(config, model, weights, method, strategy_factory, rank_info.device, log)
    torch.manual_seed(training.seed + rank_info.rank)  # every rank has its own dropout
    origin = {
        "base": base.origin(),
        TRAINED_CLASS: model_class,
        "data": data,
        "ranks": rank_info.world_size,
        "strategy": config.strategy.name,
    }
    return TrainState(
        strategy=assembled.strategy,
        method=assembled.method,
        model=assembled.model,
        scheduler=build_scheduler(config.scheduler, assembled.strategy.optimizer, total_steps),
        rank_info=rank_info,
        origin=origin,
        early_stopping=EarlyStopping(
            training.early_stopping_patience, training.early_stopping_threshold
        ),
        spikes=Spikes(training.on_spike, training.spike_threshold, training.spike_window),
        flops=assembled.flops,
        router_loss=assembled.router_loss,
    )


def new_strategy(config: Config, rank_info: RankInfo) -> Strategy:
    """The strategy of `config`, before its `setup`."""
    precision = precision_of(config.precision)
    return build_strategy(config.strategy, config.training, rank_info, precision)


def assemble(
    config: Config,
    model: nn.Module,
    weights: Weights | None,
    method: Method,
    new_strategy: Callable[[], Strategy],
    device: torch.device,
    log: Log,
) -> AssembledModel:
    """Prepare `model` for training, in this order: kernels, method, activations, loss, shards,
    optimizer. `log` receives log lines.

    `weights` has the stored tensors of parameters on meta. Raises UserError if the settings do not
    fit the model.
    """
    training, precision = config.training, precision_of(config.precision)
    log(f"kernels: {use_kernels(model, training.kernels)}")
    if config.model.add_tokens:
        log(f"new tokens: {describe_vocabulary(model, precision.master)}")
    model = method.prepare(model, training.seed, weights, device)
    fuse_adapters(model)
    if unfused := fuse_experts(model):
        log(f"experts: {unfused}")
    if base_changes := method.describe():
        log(f"base: {base_changes}")
    parameters = describe_parameters(model, precision.master, precision.compute)
    log(f"method: {config.method.name}: {parameters}")
    wants_mfu = may_have_peak(device, config.tracking.peak_tflops)
    flops = try_count_flops(model, log) if wants_mfu else None
    add_noise(model, training.neftune_alpha)
    log(f"activations: {checkpoint_activations(model, training.activation_checkpointing)}")
    if training.compile != "off":
        compile_layers(model)
    log(f"loss: {use_chunked_loss(model, training.loss)}")
    router_loss = find_router_loss(model, training.router_aux_loss)
    if router_loss is not None:
        log(f"routers: their auxiliary loss is added, times {router_loss.coefficient:g}")
    strategy = new_strategy()
    strategy.setup(
        model,
        weights,
        partial(build_optimizer, config.optimizer, lr_multiplier=method.lr_multiplier),
    )
    log(f"loading: {weights.describe() if weights else 'this rank has read the full model'}")
    log(f"strategy: {strategy.describe()}")
    if warning := strategy.warning():
        log(warning)
    dtypes = precision.describe(
        state_dtype(config.optimizer),
        has_frozen=any(not parameter.requires_grad for parameter in model.parameters()),
        reduces=strategy.rank_info.world_size > 1,
    )
    log(f"precision: {dtypes}")
    return AssembledModel(method, model, strategy, flops, router_loss)
