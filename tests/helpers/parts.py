"""Train a case with Shardway's own parts, and with a plain PyTorch loop for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from launcher.config import Config, store
from launcher.config.schema.method import METHODS
from launcher.config.schema.optimizer import OPTIMIZERS
from launcher.config.schema.precision import PRECISIONS
from launcher.config.schema.scheduler import SCHEDULERS
from launcher.config.schema.strategy import STRATEGIES
from launcher.data.build import build_loaders
from launcher.data.loader import Loader, StepBatch
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.method import build_method
from launcher.method.base import Method
from launcher.model.tokenizer import load_tokenizer
from launcher.strategy import Strategy
from launcher.training import loop
from launcher.training.build import build_train_state
from launcher.training.loop import StepLoader, StepLoaders, StopRequested
from launcher.training.metrics import StepStats
from launcher.training.plan import Plan
from launcher.training.scheduler import Schedule, build_scheduler
from launcher.training.state import Progress, TrainState
from launcher.training.throughput import ThroughputMeter
from tests.helpers.compose import composed_raw

SEED = 3
MAX_NORM = 0.5  # below the gradient norms of these runs, so that gradients are clipped
CPU = torch.device("cpu")
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """What a test trains, as the few settings in which tests differ."""

    model: Path
    data: Path
    method: str = "lora"
    method_options: Options = field(default_factory=dict)
    strategy: str = "fsdp"
    strategy_options: Options = field(default_factory=dict)
    precision: str = "fp32"
    precision_options: Options = field(default_factory=dict)
    optimizer: str = "adamw"
    optimizer_options: Options = field(default_factory=dict)
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    scheduler: str = "cosine"
    scheduler_options: Options = field(default_factory=dict)
    steps: int = 20
    global_batch_size: int = 6
    micro_batch_size: int = 1
    packing: bool = False
    training_options: Options = field(default_factory=dict)
    model_options: Options = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))  # options are mappings; equal ones may be cached separately

    def config(self) -> Config:
        """The complete configuration. Do not change it: sections are shared."""
        defaults = _defaults()
        rank = {"rank": 4} if self.method in ("lora", "qlora") else {}
        warmup = {"warmup_steps": 3} if self.scheduler == "cosine" else {}
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        return replace(
            defaults,
            model=replace(defaults.model, name_or_path=str(self.model), **self.model_options),
            data=replace(
                defaults.data,
                path=str(self.data),
                max_length=96,
                pad_to_multiple_of=8,
                packing=self.packing,
            ),
            method=METHODS[self.method](name=self.method, **{**rank, **self.method_options}),
            strategy=STRATEGIES[self.strategy](name=self.strategy, **self.strategy_options),
            precision=PRECISIONS[self.precision](name=self.precision, **self.precision_options),
            optimizer=OPTIMIZERS[self.optimizer](**rates, **self.optimizer_options),
            scheduler=SCHEDULERS[self.scheduler](
                name=self.scheduler, **{**warmup, **self.scheduler_options}
            ),
            training=replace(
                defaults.training,
                max_steps=self.steps,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=self.global_batch_size,
                max_grad_norm=MAX_NORM,
                seed=SEED,
                **self.training_options,
            ),
        )

    def with_training(self, **changes: Any) -> Case:
        return replace(self, training_options={**self.training_options, **changes})

    def build_method(self) -> Method:
        return build_method(self.config().method)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> Schedule:
        return build_scheduler(self.config().scheduler, optimizer, self.steps)

    def loader(self, rank: int = 0, world_size: int = 1, **changes: Any) -> Loader:
        """The batches of a rank. `changes`: to the section `training`."""
        return _loader(_with_training(self.config(), **changes), rank, world_size)[0]


@cache
def _defaults() -> Config:
    return store.build(composed_raw())


def _with_training(config: Config, **changes: Any) -> Config:
    return replace(config, training=replace(config.training, **changes))


def _loader(config: Config, rank: int, world_size: int) -> tuple[Loader, str]:
    """The batches of a rank, and the fingerprint of the rows."""
    loaders = build_loaders(
        config.data,
        config.training,
        load_tokenizer(Path(config.model.name_or_path), trust_remote_code=False),
        rank,
        world_size,
        say=lambda line: None,
        check=lambda: None,
    )
    return loaders.training, loaders.fingerprint


def build(
    rank_info: RankInfo, config: Config, log: Callable[[str], None] = lambda line: None
) -> tuple[TrainState, Loader]:
    """What the worker builds on a rank: the train state and its batches."""
    steps, folder = config.training.max_steps, Path(config.model.name_or_path)
    assert steps is not None
    loader, fingerprint = _loader(config, rank_info.rank, rank_info.world_size)
    train_state = build_train_state(config, folder, rank_info, fingerprint, steps, log)
    return train_state, loader


def set_up(rank_info: RankInfo, case: Case) -> tuple[TrainState, Loader]:
    return build(rank_info, case.config())


class Recorder:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.calls: list[str] = []

    def start(self, done_steps: int, total_steps: int) -> None:
        self.calls.append(f"start {done_steps} {total_steps}")

    def log(self, records: list[dict[str, Any]]) -> None:
        self.calls.append("log")
        self.records += records

    def finish(self) -> None:
        self.calls.append("finish")

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "loss" in record]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "eval_loss" in record]

    def column(self, name: str) -> list[Any]:
        """The value of this metric in every step."""
        return [record[name] for record in self.steps]


class NoCheckpoints:
    """Saves nothing, and records when it is asked to. A background save of step `fails_at`
    fails."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.fails_at = fails_at

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        self.finish()
        self.steps.append(step)

    def failed(self) -> bool:
        return self.fails_at in self.steps

    def finish(self) -> None:
        if self.failed():
            raise UserError("no space left")


def plan(total_steps: int, **changes: Any) -> Plan:
    """Settings of a complete run that logs every step, saves at its end and never evaluates."""
    usual = {"eval_steps": None, "save_steps": None, "log_steps": 1}
    options = {"end_step": total_steps, "max_grad_norm": MAX_NORM, **usual, **changes}
    return Plan(total_steps, **options)


def fit(
    train_state: TrainState,
    loader: StepLoader,
    plan: Plan,
    observer: Recorder,
    checkpoints: loop.Checkpoints | None = None,
    *,
    evaluation: StepLoader | None = None,
    stop_requested: StopRequested = lambda: False,
    done: Progress | None = None,
    meter: ThroughputMeter | None = None,
) -> int:
    """Run Shardway's loop, with defaults for unset arguments; return the last completed step."""
    return loop.fit(
        train_state,
        StepLoaders(loader, evaluation),
        plan,
        [observer],
        checkpoints or NoCheckpoints(),
        stop_requested,
        done or Progress(),
        meter or ThroughputMeter(train_state.rank_info.device),
    )


def train(rank_info: RankInfo, case: Case) -> tuple[TrainState, list[float]]:
    """Train a case to its end; return the losses of all steps."""
    train_state, loader = set_up(rank_info, case)
    recorder = Recorder()
    fit(train_state, loader, plan(case.steps), recorder)
    return train_state, recorder.column("loss")


def losses(rank_info: RankInfo, case: Case) -> list[float]:
    return train(rank_info, case)[1]


def train_step(strategy: Strategy, step_batch: StepBatch, device: torch.device = CPU) -> StepStats:
    """One step of the loop alone."""
    targets = int(strategy.sum(step_batch.target_tokens).item())
    return loop.train_step(strategy, step_batch, targets, MAX_NORM, device)


def plain_model(case: Case) -> torch.nn.Module:
    """The model from `from_pretrained` in fp32, with the case's trained parameters."""
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    return case.build_method().prepare(model, SEED)


def plain_loss(model: torch.nn.Module, step_batch: StepBatch) -> torch.Tensor:
    """Mean loss over the target tokens of a step batch that is one micro-batch."""
    (batch,) = step_batch.micro_batches
    labels = batch.input_ids.roll(-1, dims=1).flatten()
    real = batch.target_ids >= 0
    at, ids = batch.target_positions[real], batch.target_ids[real]
    assert torch.equal(labels[at], ids)
    logits = model(input_ids=batch.input_ids).logits
    return cross_entropy(logits.flatten(0, 1)[at], ids)


def plain_loader(case: Case) -> Loader:
    """Unsplit steps: one rank, and all rows of a step in one micro-batch."""
    return case.loader(micro_batch_size=case.global_batch_size)


def plain_gradients(case: Case) -> dict[str, torch.Tensor]:
    """Gradients of the first step, by name, without clipping."""
    model = plain_model(case)
    plain_loss(model, plain_loader(case).step_batch(0)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_losses(case: Case, model: torch.nn.Module | None = None) -> list[float]:
    """A textbook PyTorch loop: one process, no sharding, no accumulation. `model`: trained
    instead of the case's own."""
    model = (model or plain_model(case)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        decayed_and_not(trained, case.weight_decay),
        lr=case.learning_rate,
        fused=False,
        foreach=False,
    )
    return plain_losses_by(case, model, optimizer)


@cache
def expected_losses(case: Case) -> list[float]:
    return plain_losses(case)


def decayed_and_not(
    parameters: list[torch.nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups: matrices with `weight_decay`, vectors without."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def plain_losses_by(
    case: Case, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> list[float]:
    """The same loop with any optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loader, scheduler = plain_loader(case), case.build_scheduler(optimizer)
    losses = []
    for step in range(case.steps):
        loss = plain_loss(model, loader.step_batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses
