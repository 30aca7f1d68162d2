"""A cell of the matrix: composed as on the command line, built and trained as the worker does."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import xxhash
from torch import nn

from launcher import train
from launcher.assembly import build_learner
from launcher.checkpoint import load
from launcher.checkpoint.layout import Checkpoint
from launcher.checkpoint.learner import Learner
from launcher.checkpoint.save import Saver
from launcher.config import Config, store
from launcher.config.checks import World
from launcher.distributed.process_group import Place
from launcher.distributed.shards import local_part
from launcher.loop import Plan, fit
from launcher.model.head import ChunkedHead
from launcher.model.quantised import QuantisedLinear
from launcher.run_dir import RunDir
from tests.helpers import parts
from tests.helpers.parts import Case

ADAPTER = "method.rank=6"  # rows that 2 and 3 ranks share alike
METHODS: dict[str, tuple[str, ...]] = {
    "full": ("method=full",),
    "freeze": (
        "method=freeze",
        "method.layers=-1",
        "method.modules=[self_attn]",
        "method.extra_modules=[embed_tokens,norm]",
    ),
    "lora": ("method=lora", ADAPTER),
    "dora": ("method=lora", ADAPTER, "method.dora=true"),
    "pissa": ("method=lora", ADAPTER, "method.pissa=true"),
    "nf4": ("method=qlora", ADAPTER),
    "int8": ("method=qlora", ADAPTER, "method.bits=8"),
}
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16",),
    # A scale that no gradient of these runs overflows at, and that grows on the way.
    "fp16": ("precision=fp16", "precision.initial_scale_power=8", "precision.growth_window=3"),
    "pure_bf16": ("precision=pure_bf16",),
}
STRATEGY_WORDS: dict[str, tuple[str, ...]] = {
    "hsdp": ("strategy.shard_size=2",),
    "zero3": ("strategy.persistence_threshold=0",),  # else so small a model is kept whole
    "zero3_offload": ("strategy.persistence_threshold=0",),
}
RANKS = {"single": 1, "ddp": 3, "fsdp": 3, "zero2": 3, "hsdp": 4}  # the others: 2

# Thirteen rows make steps of twelve and of one in turn: odd steps are alike.
ROWS, SAVE, EVALUATE, END = 12, 5, 7, 9


class Cell(NamedTuple):
    """A value of each axis."""

    method: str
    strategy: str
    precision: str
    accumulated: bool = False  # a step is several micro-batches
    evaluated: bool = False  # between the save and the end

    def __str__(self) -> str:
        options = [name for name in ("accumulated", "evaluated") if getattr(self, name)]
        return "-".join([self.method, self.strategy, self.precision, *options])

    @property
    def world(self) -> World:
        ranks = RANKS[self.strategy] if self.strategy in RANKS else 2
        return World(nodes=1, nproc_per_node=ranks, gpus=0)

    @property
    def shards(self) -> dict[str, int]:
        """Ranks that share one copy of the model's parameters, and of what is learnt: masters and
        moments."""
        ranks = 2 if self.strategy == "hsdp" else self.world.size
        return {
            "model": ranks if self.strategy.startswith(("fsdp", "hsdp", "zero3")) else 1,
            "learnt": 1 if self.strategy in ("single", "ddp") else ranks,
        }

    def config(self, data: Path) -> Config:
        """What the command line makes of these choices."""
        rest = composed(
            f"data.path={data}",
            "training.epochs=null",
            f"training.max_steps={END}",
            f"training.global_batch_size={ROWS}",
            f"training.max_grad_norm={parts.MAX_NORM}",
            f"training.seed={parts.SEED}",
            "optimizer.learning_rate=1e-3",
            "optimizer.weight_decay=0.1",
            "scheduler.warmup_steps=3",
        )
        words = STRATEGY_WORDS[self.strategy] if self.strategy in STRATEGY_WORDS else ()
        micro = max(1, ROWS // self.world.size // (2 if self.accumulated else 1))
        return dataclasses.replace(
            rest,
            method=composed(*METHODS[self.method]).method,
            strategy=composed(f"strategy={self.strategy}", *words).strategy,
            precision=composed(*PRECISIONS[self.precision]).precision,
            training=dataclasses.replace(rest.training, micro_batch_size=micro),
        )


@functools.cache
def composed(*words: str) -> Config:
    """A third of a second: sections that do not depend on each other are composed once each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shardway train", "model=tiny", *words])
        (config,) = train.compose()
    return config


@dataclass
class Seen:
    """What a rank has seen of a cell."""

    steps: list[dict[str, float]]  # loss, grad_norm … of each step of the whole run
    rest: list[dict[str, float]]  # and of those that were gone on with
    evaluations: list[float]
    state: tuple[str, str]  # fingerprints of what this rank has learnt in the one and the other
    sizes: dict[str, tuple[int, int]]  # bytes between steps: (of this rank, of one copy)
    dtypes: dict[str, set[torch.dtype]]


class Midway(Saver):
    """Saves once: what is saved at the end would be read by nobody."""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        if step == SAVE:
            super().save(step, tokens, eval_loss)


EXACT = ("step", "loss", "learning_rate", "grad_norm", "loss_scale", "skipped")


@dataclass
class Log:
    """Observes a run; of its figures those that do not hang on the clock."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    def start(self, done_steps: int, total_steps: int) -> None: ...
    def finish(self) -> None: ...
    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "eval_loss" in record:
                self.evaluations.append(record["eval_loss"])
            else:
                self.steps.append({key: record[key] for key in EXACT if key in record})


def run(place: Place, config: Config, folder: Path, evaluated: bool = False) -> Seen:
    """Train through, with a save on the way and perhaps an evaluation after it; then build anew and
    go on from what was saved, without evaluation."""
    learner = _build(config, place)
    hidden: set[torch.dtype] = set()
    assert type(learner.model.get_output_embeddings()) is ChunkedHead  # type: ignore[operator]
    head = learner.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda module, inputs: hidden.add(inputs[0].dtype))
    log = _fit(learner, config, folder, evaluated=evaluated)
    handle.remove()
    again = _build(config, place)
    load.restore(Checkpoint(folder / f"checkpoints/step-{SAVE:06d}"), again, force=False)
    rest = _fit(again, config, folder, first=SAVE)
    return Seen(
        log.steps,
        rest.steps,
        log.evaluations,
        (_fingerprint(learner), _fingerprint(again)),
        {"model": _model_bytes(learner.model), "learnt": _learnt_bytes(learner)},
        {**_dtypes(learner), "compute": hidden},
    )


def losses(place: Place, config: Config, folder: Path) -> list[float]:
    """Of the whole run alone."""
    log = _fit(_build(config, place), config, folder)
    return [step["loss"] for step in log.steps]


def plain_case(config: Config) -> Case:
    """The same for a plain loop."""
    options = dataclasses.asdict(config.method)
    name = options.pop("name")
    return Case(
        Path(config.model.name_or_path), Path(config.data.path), method=name,
        method_options=tuple(options.items()), steps=END, global_batch_size=ROWS,
    )  # fmt: skip


def _build(config: Config, place: Place) -> Learner:
    folder = Path(config.model.name_or_path)
    learner: Learner = build_learner(config, folder, place, "rows", END, lambda line: None)
    return learner


def _fit(
    learner: Learner, config: Config, folder: Path, first: int = 0, evaluated: bool = False
) -> Log:
    place, training = learner.place, config.training
    rows = plain_case(config).loader(place.rank, place.world_size, training.micro_batch_size)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(store.dump(config))
    log = Log()
    fit(
        learner.strategy,
        learner.scheduler,
        rows,
        rows if evaluated else None,
        Plan(
            END, END, training.max_grad_norm, log_steps=1, eval_steps=EVALUATE, save_steps=SAVE
        ),
        [log],
        Midway(learner, RunDir(folder), config.checkpoint),
        place.device,
        halt=lambda: False,
        done_steps=first,
    )  # fmt: skip
    return log


def _fingerprint(learner: Learner) -> str:
    state = learner.strategy.state()
    digest = xxhash.xxh3_128()
    for shards in (state.weights, *state.moments.values()):
        for shard in shards.values():
            digest.update(shard.local.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _model_bytes(model: nn.Module) -> tuple[int, int]:
    mine = whole = 0
    for parameter in model.parameters():
        local = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else local_part(parameter)
        numel = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        mine += local.nbytes
        whole += numel * local.itemsize
    return mine, whole


def _learnt_bytes(learner: Learner) -> tuple[int, int]:
    """Of this rank with its padding."""
    strategy: Any = learner.strategy
    state = strategy.state()
    shards = [s for each in (state.weights, *state.moments.values()) for s in each.values()]
    optimizer = strategy.optimizer
    # Under zero3 the engine shows the optimizer one of them at a time.
    shown = [p for group in optimizer.param_groups for p in group["params"]]
    masters = strategy._flats if hasattr(strategy, "_flats") else shown
    moments = [v for each in optimizer.state.values() for v in each.values() if torch.is_tensor(v)]
    mine = sum(local_part(each).nbytes for each in (*masters, *moments) if each.ndim)
    return mine, sum(shard.nbytes for shard in shards)


def _dtypes(learner: Learner) -> dict[str, set[torch.dtype]]:
    state = learner.strategy.state()
    packed = {id(m.weight) for m in learner.model.modules() if isinstance(m, QuantisedLinear)}
    frozen = [p for p in learner.model.parameters() if not p.requires_grad]
    return {
        "trained": {shard.local.dtype for shard in state.weights.values()},
        "moments": {s.local.dtype for each in state.moments.values() for s in each.values()},
        "frozen": {p.dtype for p in frozen if id(p) not in packed},
        "packed": {p.dtype for p in frozen if id(p) in packed},
    }
