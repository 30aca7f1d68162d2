"""The rules between sections: a table of id, condition, sentence and the override that mends it."""

from __future__ import annotations

import math
from pathlib import Path

from launcher.config import Config, deepspeed
from launcher.config.compile_rules import COMPILE_RULES
from launcher.config.data_rules import DATA_RULES
from launcher.config.liger_rules import LIGER_RULES
from launcher.config.method_rules import METHOD_RULES
from launcher.config.model_rules import MODEL_RULES
from launcher.config.offload_rules import OFFLOAD_RULES
from launcher.config.optimizer_rules import OPTIMIZER_RULES
from launcher.config.quantised_rules import QUANTISED_RULES
from launcher.config.rule import Example, Rule, World
from launcher.config.schedule_rules import SCHEDULE_RULES
from launcher.config.slurm_rules import SLURM_RULES
from launcher.config.strategy import HsdpConfig, ZeroConfig
from launcher.config.tracking_rules import TRACKING_RULES


def broken_rules(config: Config, world: World, rules: tuple[Rule, ...] | None = None) -> list[str]:
    """One sentence with its fix for every rule (of `rules`) that `config` breaks on `world`."""
    return [
        f"{rule.sentence(config, world)} → {rule.fix(config, world)} [{rule.id}]"
        for rule in rules or RULES
        if rule.broken(config, world)
    ]


def _rows_per_micro_batch(config: Config, world: World) -> int:
    return world.size * config.training.micro_batch_size


def _shard_size(config: Config, world: World) -> int | None:
    """Ranks that share one copy under hsdp, None under the other strategies."""
    strategy = config.strategy
    if not isinstance(strategy, HsdpConfig):
        return None
    return strategy.shard_size or world.nproc_per_node


def _contradictions(config: Config, world: World) -> list[str]:
    if not isinstance(config.strategy, ZeroConfig):
        return []
    return deepspeed.contradictions(config.strategy, config.training, config.precision, world.size)


def _taken(config: Config) -> bool:
    """Whether run_dir is there and nothing says that this run may go on in it."""
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
            "exactly one says when training ends"
        ),
        lambda c, w: "training.epochs=3 training.max_steps=null",
        Example("training.max_steps=100 training.epochs=3"),
    ),
    Rule(
        "batch-divides",
        "training.global_batch_size is a multiple of ranks × training.micro_batch_size",
        lambda c, w: c.training.global_batch_size % _rows_per_micro_batch(c, w) != 0,
        lambda c, w: (
            f"training.global_batch_size={c.training.global_batch_size} is no multiple of "
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
        "strategy=single has one rank",
        lambda c, w: c.strategy.name == "single" and w.size > 1,
        lambda c, w: f"strategy=single runs on one rank, and there are {w.size}",
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
        "cluster=local is one machine",
        lambda c, w: c.cluster.name == "local" and c.cluster.nodes > 1,
        lambda c, w: f"cluster.nodes={c.cluster.nodes}, but cluster=local is this machine only",
        lambda c, w: (
            "cluster.nodes=1, or start torchrun --nnodes "
            f"{c.cluster.nodes} … -m launcher.train on each machine"
        ),
        Example("cluster.nodes=2"),
    ),
    Rule(
        "gpus-for-ranks",
        "every rank has a GPU of its own, where there are GPUs",
        lambda c, w: 0 < w.gpus < w.nproc_per_node,
        lambda c, w: (
            f"cluster.nproc_per_node={w.nproc_per_node} wants a GPU for each rank, "
            f"and {w.gpus} can be seen"
        ),
        lambda c, w: f"cluster.nproc_per_node={w.gpus}",
        Example("cluster.nproc_per_node=4", gpus=2),
    ),
    *SCHEDULE_RULES,
    *OPTIMIZER_RULES,
    *MODEL_RULES,
    *METHOD_RULES,
    *QUANTISED_RULES,
    *OFFLOAD_RULES,
    *COMPILE_RULES,
    *LIGER_RULES,
    *SLURM_RULES,
    *DATA_RULES,
    *TRACKING_RULES,
    Rule(
        "zero-extra-agrees",
        "strategy.extra says nothing that another setting says otherwise",
        lambda c, w: bool(_contradictions(c, w)),
        lambda c, w: "; ".join(_contradictions(c, w)),
        lambda c, w: "take them out of strategy.extra",
        Example("strategy=zero2 +strategy.extra.gradient_clipping=3.0"),
    ),
    Rule(
        "stop-before-the-end",
        "training.stop_after_steps lies within the training",
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
        "resume=auto comes with the run_dir to go on in",
        lambda c, w: c.resume == "auto" and c.run_dir is None,
        lambda c, w: "resume=auto goes on in a run, and run_dir does not name one",
        lambda c, w: "run_dir=RUN, or resume=none",
        Example("resume=auto"),
    ),
    Rule(
        "run-dir-is-new",
        "run_dir does not exist yet, or is a run that resume=auto goes on with",
        # Rank 0 makes it; a rank that comes later finds it made.
        lambda c, w: w.rank == 0 and _taken(c),
        lambda c, w: f"run_dir={c.run_dir} exists, and nothing is overwritten",
        lambda c, w: (
            "resume=auto to go on with it, or run_dir=null (a new name) or another folder"
            if (Path(c.run_dir or "") / "config.yaml").is_file()
            else "run_dir=null (a new name) or another folder"
        ),
        Example("run_dir=runs/first", files={"runs/first/config.yaml": ""}),
    ),
)
