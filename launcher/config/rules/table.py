"""The table of all rules: id, requirement, condition, message, and the override that fixes it."""

from __future__ import annotations

import math
from pathlib import Path

from launcher.config import Config, deepspeed
from launcher.config.rules.arithmetic import ARITHMETIC_RULES
from launcher.config.rules.compile import COMPILE_RULES
from launcher.config.rules.data import DATA_RULES
from launcher.config.rules.hang import HANG_RULES
from launcher.config.rules.liger import LIGER_RULES
from launcher.config.rules.method import METHOD_RULES
from launcher.config.rules.model import MODEL_RULES
from launcher.config.rules.offload import OFFLOAD_RULES
from launcher.config.rules.optimizer import OPTIMIZER_RULES
from launcher.config.rules.qlora import QUANTIZED_RULES
from launcher.config.rules.rule import Example, Machine, Rule, World
from launcher.config.rules.schedule import SCHEDULE_RULES
from launcher.config.rules.slurm import SLURM_RULES
from launcher.config.rules.tracking import TRACKING_RULES
from launcher.config.schema.strategy import HsdpConfig, ZeroConfig


def broken_rules(config: Config, world: World, rules: tuple[Rule, ...] | None = None) -> list[str]:
    """One message with its fix for every rule (of `rules`) that `config` breaks on `world`."""
    return [
        f"{rule.message(config, world)} → {rule.fix(config, world)} [{rule.id}]"
        for rule in rules or RULES
        if rule.broken(config, world)
    ]


def _rows_per_micro_batch(config: Config, world: World) -> int:
    return world.size * config.training.micro_batch_size


def _shard_size(config: Config, world: World) -> int | None:
    """Ranks that share one copy under hsdp, None under other strategies."""
    strategy = config.strategy
    if not isinstance(strategy, HsdpConfig):
        return None
    return strategy.shard_size or world.nproc_per_node


def _contradictions(config: Config, world: World) -> list[str]:
    if not isinstance(config.strategy, ZeroConfig):
        return []
    return deepspeed.contradictions(config.strategy, config.training, config.precision, world.size)


def _run_dir_is_taken(config: Config) -> bool:
    """Whether run_dir exists and is not a run that resume=auto resumes."""
    if config.run_dir is None or not Path(config.run_dir).exists():
        return False
    return config.resume != "auto" or not (Path(config.run_dir) / "config.yaml").is_file()


RULES: tuple[Rule, ...] = (
    Rule(
        "length-of-training",
        "exactly one of training.max_steps and training.epochs is set",
        lambda c, w: (c.training.max_steps is None) == (c.training.epochs is None),
        lambda c, w: (
            f"training.max_steps={c.training.max_steps} and training.epochs={c.training.epochs}: "
            "set exactly one of them"
        ),
        lambda c, w: (
            "training.epochs=1, or training.max_steps=100"
            if c.training.max_steps is None
            else "training.epochs=null, or training.max_steps=null"
        ),
        Example("training.max_steps=100 training.epochs=3"),
    ),
    Rule(
        "batch-divides",
        "training.global_batch_size is a multiple of ranks × training.micro_batch_size",
        lambda c, w: c.training.global_batch_size % _rows_per_micro_batch(c, w) != 0,
        lambda c, w: (
            f"training.global_batch_size={c.training.global_batch_size} is not a multiple of "
            f"{w.size} ranks × training.micro_batch_size={c.training.micro_batch_size}"
        ),
        lambda c, w: "training.global_batch_size={}".format(
            math.ceil(c.training.global_batch_size / _rows_per_micro_batch(c, w))
            * _rows_per_micro_batch(c, w)
        ),
        Example("training.global_batch_size=7 cluster.nproc_per_node=2"),
    ),
    Rule(
        "single-is-one-rank",
        "strategy=single runs on one rank",
        lambda c, w: c.strategy.name == "single" and w.size > 1,
        lambda c, w: f"strategy=single runs on one rank, but there are {w.size}",
        lambda c, w: "strategy=fsdp, or cluster.nproc_per_node=1",
        Example("strategy=single cluster.nproc_per_node=2"),
    ),
    Rule(
        "hsdp-groups",
        "strategy.shard_size divides the ranks into equal groups",
        lambda c, w: bool((size := _shard_size(c, w)) and w.size % size),
        lambda c, w: (
            f"strategy.shard_size={_shard_size(c, w)} does not divide the {w.size} ranks "
            "into equal groups"
        ),
        lambda c, w: f"strategy.shard_size={w.size}, or strategy=fsdp",
        Example("strategy=hsdp strategy.shard_size=3 cluster.nproc_per_node=4"),
    ),
    Rule(
        "one-machine",
        "cluster=local uses one machine",
        lambda c, w: c.cluster.name == "local" and c.cluster.nodes > 1,
        lambda c, w: f"cluster.nodes={c.cluster.nodes}, but cluster=local uses only this machine",
        lambda c, w: (
            "cluster.nodes=1, or start torchrun --nnodes "
            f"{c.cluster.nodes} … -m launcher.train on each machine"
        ),
        Example("cluster.nodes=2"),
    ),
    Rule(
        "gpus-for-ranks",
        "every rank has its own GPU, if there are GPUs",
        lambda c, w: 0 < w.gpus < w.nproc_per_node,
        lambda c, w: (
            f"cluster.nproc_per_node={w.nproc_per_node} needs one GPU per rank, "
            f"but {w.gpus} are visible"
        ),
        lambda c, w: f"cluster.nproc_per_node={w.gpus}",
        Example("cluster.nproc_per_node=4", Machine(gpus=2)),
    ),
    *SCHEDULE_RULES,
    *OPTIMIZER_RULES,
    *MODEL_RULES,
    *METHOD_RULES,
    *QUANTIZED_RULES,
    *OFFLOAD_RULES,
    *ARITHMETIC_RULES,
    *COMPILE_RULES,
    *LIGER_RULES,
    *SLURM_RULES,
    *HANG_RULES,
    *DATA_RULES,
    *TRACKING_RULES,
    Rule(
        "zero-extra-agrees",
        "strategy.extra does not contradict other settings",
        lambda c, w: bool(_contradictions(c, w)),
        lambda c, w: "; ".join(_contradictions(c, w)),
        lambda c, w: "remove them from strategy.extra",
        Example("strategy=zero2 +strategy.extra.gradient_clipping=3.0"),
    ),
    Rule(
        "stop-before-the-end",
        "training.stop_after_steps is at most training.max_steps",
        lambda c, w: (
            c.training.max_steps is not None
            and (c.training.stop_after_steps or 0) > c.training.max_steps
        ),
        lambda c, w: (
            f"training.stop_after_steps={c.training.stop_after_steps} is more than "
            f"training.max_steps={c.training.max_steps}"
        ),
        lambda c, w: "training.stop_after_steps=null",
        Example("training.max_steps=100 training.epochs=null training.stop_after_steps=200"),
    ),
    Rule(
        "auto-names-a-run",
        "resume=auto needs the run_dir to resume",
        lambda c, w: c.resume == "auto" and c.run_dir is None,
        lambda c, w: "resume=auto resumes a run, but run_dir is not set",
        lambda c, w: "run_dir=RUN, or resume=none",
        Example("resume=auto"),
    ),
    Rule(
        "run-dir-is-new",
        "run_dir does not exist yet, or is a run that resume=auto resumes",
        # Only rank 0 checks this: it creates the folder, and other ranks may find it created.
        lambda c, w: w.rank == 0 and _run_dir_is_taken(c),
        lambda c, w: f"run_dir={c.run_dir} exists, and nothing is overwritten",
        lambda c, w: (
            "resume=auto to resume it, or run_dir=null (a new name) or another folder"
            if (Path(c.run_dir or "") / "config.yaml").is_file()
            else "run_dir=null (a new name) or another folder"
        ),
        Example("run_dir=runs/first", files={"runs/first/config.yaml": ""}),
    ),
)
