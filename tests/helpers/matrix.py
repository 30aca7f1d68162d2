"""A cell of the matrix: composed as on the command line, trained with Shardway's own parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import nn

from launcher.checkpoint.save import Saver
from launcher.config import Config
from launcher.config.rules.rule import World
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from launcher.model.chunked_loss import ChunkedCrossEntropyHead
from launcher.model.quantized_linear import QuantizedLinear
from launcher.training.state import Progress, TrainState
from tests.helpers import checkpoints, parts
from tests.helpers.compose import composed
from tests.helpers.parts import Case, Recorder

ADAPTER = "method.rank=6"  # rows that 2 and 3 ranks share equally
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
    # A scale at which no gradient of these runs overflows, and which grows during the run.
    "fp16": ("precision=fp16", "precision.initial_scale_power=8", "precision.growth_window=3"),
    "pure_bf16": ("precision=pure_bf16",),
}
STRATEGY_WORDS: dict[str, tuple[str, ...]] = {
    "zero3": ("strategy.persistence_threshold=0",),  # otherwise such a small model is not sharded
    "zero3_offload": ("strategy.persistence_threshold=0",),
}
RANKS = {"single": 1, "ddp": 3, "fsdp": 3, "zero2": 3, "hsdp": 4}  # the others: 2

# Thirteen rows alternate steps of twelve rows and of one: odd steps have equal sizes.
ROWS, SAVE, EVALUATE, END = 12, 5, 7, 9


class Cell(NamedTuple):
    """One value for each axis."""

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
        return World(nodes=1, nproc_per_node=ranks)

    def shards(self, ranks: int) -> dict[str, int]:
        """How many of `ranks` share one copy of the model's parameters, and of the trained state:
        master weights and moments."""
        ranks = min(2, ranks) if self.strategy == "hsdp" else ranks
        return {
            "model": ranks if self.strategy.startswith(("fsdp", "hsdp", "zero3")) else 1,
            "learned": 1 if self.strategy in ("single", "ddp") else ranks,
        }

    def config(self, data: Path, ranks: int | None = None) -> Config:
        """The configuration that the command line composes for these choices. `ranks`: None: as
        many as in `world`."""
        ranks = ranks or self.world.size
        rest = composed(
            f"data.path={data}",
            "data.max_length=96",
            "data.too_long=cut",
            "data.pad_to_multiple_of=8",
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
        if self.strategy == "hsdp":
            words = (f"strategy.shard_size={min(2, ranks)}",)
        micro = max(1, ROWS // ranks // (2 if self.accumulated else 1))
        return dataclasses.replace(
            rest,
            method=composed(*METHODS[self.method]).method,
            strategy=composed(f"strategy={self.strategy}", *words).strategy,
            precision=composed(*PRECISIONS[self.precision]).precision,
            training=dataclasses.replace(rest.training, micro_batch_size=micro),
        )


@dataclass
class Seen:
    """What a rank has recorded of a cell."""

    steps: list[dict[str, float]]  # loss, grad_norm … of each step of the complete run
    rest: list[dict[str, float]]  # the same after the save, from a run that resumed there
    evaluations: list[float]
    state: tuple[str, str]  # fingerprints of this rank's trained state in either run
    sizes: dict[str, tuple[int, int]]  # bytes between steps: (of this rank, of one copy)
    dtypes: dict[str, set[torch.dtype]]


class SavesOnce(Saver):
    """Saves only at SAVE: no test reads a save at the end."""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        if step == SAVE:
            super().save(step, tokens, eval_loss)


EXACT = ("step", "loss", "learning_rate", "grad_norm", "loss_scale", "skipped")


def run(rank_info: RankInfo, config: Config, folder: Path, evaluated: bool = False) -> Seen:
    """Train without a stop, with a save and perhaps an evaluation after it. Then build again and
    resume from the save, without evaluation."""
    train_state, loader = parts.build(rank_info, config)
    hidden: set[torch.dtype] = set()
    head = train_state.model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, ChunkedCrossEntropyHead)
    handle = head.register_forward_pre_hook(lambda module, inputs: hidden.add(inputs[0].dtype))
    whole = Recorder()
    parts.fit(
        train_state,
        loader,
        parts.plan(END, eval_steps=EVALUATE, save_steps=SAVE),
        whole,
        checkpoints.saver(train_state, config, folder, SavesOnce),
        evaluation=loader if evaluated else None,
    )
    handle.remove()
    again, loader = parts.build(rank_info, config)
    done = checkpoints.restore(again, folder, SAVE)
    rest = _train(again, loader, done)
    return Seen(
        _exact(whole),
        _exact(rest),
        [record["eval_loss"] for record in whole.evaluations],
        (_fingerprint(train_state), _fingerprint(again)),
        {"model": _model_bytes(train_state.model), "learned": _learned_bytes(train_state)},
        {**_dtypes(train_state), "compute": hidden},
    )


def losses(rank_info: RankInfo, config: Config) -> list[float]:
    """Of the complete run only."""
    return _train(*parts.build(rank_info, config)).column("loss")


def _train(train_state: TrainState, loader: Any, done: Progress | None = None) -> Recorder:
    recorder = Recorder()
    parts.fit(train_state, loader, parts.plan(END), recorder, done=done)
    return recorder


def _exact(recorder: Recorder) -> list[dict[str, float]]:
    """The metrics of each step that do not depend on the clock."""
    return [{key: step[key] for key in EXACT if key in step} for step in recorder.steps]


def plain_case(config: Config) -> Case:
    """The same from a plain loop."""
    options = dataclasses.asdict(config.method)
    name = options.pop("name")
    return Case(
        Path(config.model.name_or_path), Path(config.data.path), method=name,
        method_options=options, steps=END, global_batch_size=ROWS,
    )  # fmt: skip


def _fingerprint(train_state: TrainState) -> str:
    state = train_state.strategy.state()
    digest = xxhash.xxh3_128()
    for shards in (state.weights, *state.moments.values()):
        for shard in shards.values():
            digest.update(shard.local.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _model_bytes(model: nn.Module) -> tuple[int, int]:
    mine = whole = 0
    for parameter in model.parameters():
        local = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else local_part(parameter)
        numel = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        mine += local.nbytes
        whole += numel * local.itemsize
    return mine, whole


def _learned_bytes(train_state: TrainState) -> tuple[int, int]:
    """Bytes of this rank, including padding."""
    strategy: Any = train_state.strategy
    state = strategy.state()
    shards = [s for each in (state.weights, *state.moments.values()) for s in each.values()]
    optimizer = strategy.optimizer
    # Under zero3 the engine shows the optimizer one of them at a time.
    shown = [p for group in optimizer.param_groups for p in group["params"]]
    masters = strategy._flat_masters if hasattr(strategy, "_flat_masters") else shown
    moments = [v for each in optimizer.state.values() for v in each.values() if torch.is_tensor(v)]
    mine = sum(local_part(each).nbytes for each in (*masters, *moments) if each.ndim)
    return mine, sum(shard.nbytes for shard in shards)


def _dtypes(train_state: TrainState) -> dict[str, set[torch.dtype]]:
    state = train_state.strategy.state()
    packed = {id(m.weight) for m in train_state.model.modules() if isinstance(m, QuantizedLinear)}
    frozen = [p for p in train_state.model.parameters() if not p.requires_grad]
    return {
        "trained": {shard.local.dtype for shard in state.weights.values()},
        "moments": {s.local.dtype for each in state.moments.values() for s in each.values()},
        "frozen": {p.dtype for p in frozen if id(p) not in packed},
        "packed": {p.dtype for p in frozen if id(p) in packed},
    }
