"""Build the parts of a run as the worker does, and a plain PyTorch loop to hold them against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from launcher import loop
from launcher.checkpoint.learner import Learner
from launcher.checkpoint.save import Saver
from launcher.config import store
from launcher.config.data import DataConfig
from launcher.config.method import METHODS as METHOD_SCHEMAS
from launcher.config.model import ModelConfig
from launcher.config.optimizer import OPTIMIZERS as OPTIMIZER_SCHEMAS
from launcher.config.precision import PRECISIONS as PRECISION_SCHEMAS
from launcher.config.scheduler import CosineConfig
from launcher.config.strategy import STRATEGIES as STRATEGY_SCHEMAS
from launcher.config.training import CheckpointConfig, TrainingConfig
from launcher.data.dataset import load_data
from launcher.data.loader import Loader
from launcher.data.order import Shuffled
from launcher.data.packing import one_each, pack
from launcher.distributed.process_group import Place
from launcher.method import build_method
from launcher.method.base import Method
from launcher.method.fused import fuse_adapters
from launcher.model.compiled import compile_layers
from launcher.model.head import chunk_loss
from launcher.model.kernels import use_kernels
from launcher.model.load import Weights, build_model
from launcher.model.noise import add_noise
from launcher.model.recompute import recompute_activations
from launcher.model.tokenizer import load_tokenizer
from launcher.optimizer import build_optimizer
from launcher.precision import Precision, precision_of
from launcher.run_dir import RunDir
from launcher.scheduler import build_scheduler
from launcher.strategy import Strategy, build_strategy
from tests.config.test_schema import composed

SEED = 3
MAX_NORM = 0.5  # below the gradient norms of these runs: clipping takes part
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    model: Path
    data: Path
    method: str = "lora"
    strategy: str = "fsdp"
    precision: str = "fp32"
    precision_options: tuple[tuple[str, Any], ...] = ()
    method_options: tuple[tuple[str, Any], ...] = ()
    strategy_options: tuple[tuple[str, Any], ...] = ()
    optimizer_name: str = "adamw"
    optimizer_options: tuple[tuple[str, Any], ...] = ()
    activation_checkpointing: str = "off"
    loss: str = "chunked"
    kernels: str = "torch"
    compiled: bool = False
    neftune_alpha: float | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    steps: int = 20
    global_batch_size: int = 6
    micro_batch_size: int = 1
    packing: bool = False

    def build_method(self) -> Method:
        options = dict(self.method_options)
        if self.method in ("lora", "qlora"):
            options = {"rank": 4, **options}
        return build_method(METHOD_SCHEMAS[self.method](name=self.method, **options))

    def build_precision(self) -> Precision:
        schema = PRECISION_SCHEMAS[self.precision]
        return precision_of(schema(name=self.precision, **dict(self.precision_options)))

    def optimizer(self, trained: Any) -> torch.optim.Optimizer:
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        schema = OPTIMIZER_SCHEMAS[self.optimizer_name]
        config = schema(**rates, **dict(self.optimizer_options))
        return build_optimizer(config, trained, self.build_method().rate)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        config = CosineConfig(name="cosine", warmup_steps=3)
        return build_scheduler(config, optimizer, self.steps)

    def loader(self, rank: int, world_size: int, micro_batch_size: int) -> Loader:
        tokenizer = load_tokenizer(self.model, False)
        config = DataConfig(path=str(self.data), max_length=96, pad_to_multiple_of=8)
        rows = load_data(config, tokenizer).rows
        numbers = np.arange(len(rows))
        sequences = pack(numbers, rows.lengths, 96) if self.packing else one_each(numbers)
        return Loader(
            rows,
            sequences,
            Shuffled(SEED, len(sequences)),
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            global_batch_size=self.global_batch_size,
            pad_to_multiple_of=8,
            pad_token_id=tokenizer.pad_token_id,
            packed=self.packing,
        )


def set_up(place: Place, case: Case) -> tuple[Strategy, Method, Loader]:
    strategy, method, _ = build(place, case)
    return strategy, method, case.loader(place.rank, place.world_size, case.micro_batch_size)


def build(place: Place, case: Case) -> tuple[Strategy, Method, Weights | None]:
    method = case.build_method()
    model, weights = build_model(
        ModelConfig(name_or_path=str(case.model)),
        case.model,
        SEED,
        case.build_precision().compute,
        case.packing,
    )
    use_kernels(model, case.kernels)
    model = method.prepare(model, SEED, weights)
    fuse_adapters(model)
    add_noise(model, case.neftune_alpha)
    recompute_activations(model, case.activation_checkpointing)
    if case.compiled:
        compile_layers(model)
    chunk_loss(model, case.loss)
    schema = STRATEGY_SCHEMAS[case.strategy]
    config = schema(name=case.strategy, **dict(case.strategy_options))
    training = TrainingConfig(
        micro_batch_size=case.micro_batch_size,
        global_batch_size=case.global_batch_size,
        max_grad_norm=MAX_NORM,
    )
    strategy = build_strategy(config, training, place, case.build_precision())
    strategy.setup(model, weights, case.optimizer)
    return strategy, method, weights


def learner(
    place: Place, case: Case, strategy: Strategy, method: Method, **options: Any
) -> Learner:
    """As the worker makes it."""
    about = {"base": {"name_or_path": str(case.model), "revision": None}, "data": "rows"}
    return Learner(
        strategy,
        method,
        strategy._bare if hasattr(strategy, "_bare") else strategy.model,
        case.scheduler(strategy.optimizer),
        place,
        dist.new_group(backend="gloo"),
        {**about, "ranks": place.world_size},
        **options,
    )


def saver(learner: Learner, folder: Path, **options: Any) -> Saver:
    """As the worker makes it, for a run in `folder`."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(store.dump(store.build(composed())))
    return Saver(learner, RunDir(folder), CheckpointConfig(**options))


def train_step(strategy: Strategy, window: Any, device: torch.device = CPU) -> Any:
    """One step as `fit` does it."""
    targets = strategy.sum(window.target_tokens).item()
    return loop.train_step(strategy, window, targets, MAX_NORM, device)


def train(place: Place, case: Case) -> tuple[Strategy, Method, list[float]]:
    """Train as `fit` does; the losses of all steps."""
    strategy, method, loader = set_up(place, case)
    scheduler = case.scheduler(strategy.optimizer)
    losses = []
    strategy.model.train()
    for step in range(case.steps):
        stats = train_step(strategy, loader.window(step))
        scheduler.step()
        losses.append(strategy.sum(stats.loss).item())
    return strategy, method, losses


def plain_model(case: Case) -> torch.nn.Module:
    """The model by `from_pretrained` in fp32, with the case's trained parameters."""
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    return case.build_method().prepare(model, SEED)


def plain_loss(model: torch.nn.Module, window: Any) -> torch.Tensor:
    """Mean loss over the target tokens of a window, all rows in one batch, with attention mask."""
    (batch,) = window.micro_batches
    labels = batch.input_ids.roll(-1, dims=1).flatten()
    real = batch.target_ids >= 0
    at, ids = batch.target_at[real], batch.target_ids[real]
    assert torch.equal(labels[at], ids)
    logits = model(input_ids=batch.input_ids).logits
    return cross_entropy(logits.flatten(0, 1)[at], ids)


def plain_gradients(case: Case) -> dict[str, torch.Tensor]:
    """Gradients of the first step, by name, without clipping."""
    model = plain_model(case)
    plain_loss(model, case.loader(0, 1, case.global_batch_size).window(0)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_losses(case: Case, model: torch.nn.Module | None = None) -> list[float]:
    """A textbook PyTorch loop: one process, no sharding, no accumulation. `model`: to train instead
    of the case's own."""
    model = (model or plain_model(case)).train()
    loader = case.loader(0, 1, case.global_batch_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    spared = [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": case.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        lr=case.learning_rate,
        fused=False,
        foreach=False,
    )
    scheduler = case.scheduler(optimizer)
    losses = []
    for step in range(case.steps):
        loss = plain_loss(model, loader.window(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses
