"""The rules of jobs: `cluster=slurm`."""

from __future__ import annotations

import re

from launcher.config import Config
from launcher.config.cluster import SlurmConfig
from launcher.config.rule import Example, Rule, World

# sbatch(1), --time: minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]. Plain
# minutes are not taken: YAML reads 4:00:00 without quotes as the number 14400.
LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
NONE = ("INFINITE", "UNLIMITED", "0")


def seconds(limit: str) -> float | None:
    """Of a time limit as sbatch reads it; None where it is none that sbatch knows."""
    if limit.upper() in NONE:
        return float("inf")
    match = LIMIT.fullmatch(limit)
    if match is None or limit.isdigit():
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    hours_first = days is not None or len(numbers) == 3
    units = [3600, 60, 1] if hours_first else [60, 1]
    ends = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return int(days or 0) * 86400 + ends


def _slurm(config: Config) -> SlurmConfig:
    """What the rules ask of it holds for no other cluster."""
    cluster = config.cluster
    return cluster if isinstance(cluster, SlurmConfig) else SlurmConfig(name="slurm")


def _unreadable(config: Config, world: World) -> bool:
    limit = _slurm(config).time
    return limit is not None and seconds(limit) is None


def _too_short(config: Config, world: World) -> bool:
    cluster = _slurm(config)
    limit = seconds(cluster.time) if cluster.time else None
    return limit is not None and cluster.signal_seconds >= limit / 2


# Options of sbatch that Shardway gives itself.
OURS = (
    *("nodes", "ntasks", "ntasks-per-node", "array", "output", "chdir", "open-mode"),
    *("requeue", "no-requeue", "signal", "export", "wrap"),
)


def _repeated(cluster: SlurmConfig) -> list[str]:
    said = (re.match(r"--([a-z-]+)", flag) for flag in cluster.extra_flags)
    return [f"--{match[1]}" for match in said if match and match[1] in OURS]


SLURM_RULES: tuple[Rule, ...] = (
    Rule(
        "limit-is-readable",
        "cluster.time is hours:minutes:seconds, minutes:seconds or days-hours",
        _unreadable,
        lambda c, w: (
            f"cluster.time={_slurm(c).time} is no hours:minutes:seconds, minutes:seconds or "
            "days-hours (in a file in quotes, for YAML makes a number of 4:00:00)"
        ),
        lambda c, w: "cluster.time=4:00:00, or cluster.time=1-12",
        Example("cluster=slurm cluster.time=4h"),
    ),
    Rule(
        "signal-leaves-time-to-train",
        "cluster.signal_seconds is less than half of cluster.time",
        _too_short,
        lambda c, w: (
            f"cluster.signal_seconds={_slurm(c).signal_seconds} before the end of "
            f"cluster.time={_slurm(c).time} hardly leave time to train"
        ),
        lambda c, w: (
            f"cluster.signal_seconds={max(1, int(seconds(_slurm(c).time or '') or 0) // 4)}, or a "
            "longer cluster.time"
        ),
        Example("cluster=slurm cluster.time=3:00"),
    ),
    Rule(
        "gpu-type-has-a-number",
        "cluster.gpu_type comes with cluster.gpus_per_node",
        lambda c, w: _slurm(c).gpu_type is not None and _slurm(c).gpus_per_node == 0,
        lambda c, w: f"cluster.gpu_type={_slurm(c).gpu_type}, and no GPU is asked for",
        lambda c, w: "cluster.gpus_per_node=8, or cluster.gpu_type=null",
        Example("cluster=slurm cluster.gpu_type=h100"),
    ),
    Rule(
        "jobs-can-go-on",
        "a job that is queued again has checkpoints to go on from",
        lambda c, w: (
            c.cluster.name == "slurm"
            and c.checkpoint.content != "all"
            and _slurm(c).requeue_limit > 0
        ),
        lambda c, w: (
            f"checkpoint.content={c.checkpoint.content} cannot be resumed, and "
            f"cluster.requeue_limit={_slurm(c).requeue_limit} queues the job again"
        ),
        lambda c, w: "checkpoint.content=all, or cluster.requeue_limit=0",
        Example("cluster=slurm checkpoint.content=weights"),
    ),
    Rule(
        "jobs-share-a-disk",
        "launch.shared_disk=false is for machines on which torchrun is started by hand",
        lambda c, w: c.cluster.name == "slurm" and not c.launch.shared_disk,
        lambda c, w: (
            f"cluster={c.cluster.name} with launch.shared_disk=false: the nodes of a job meet in "
            "the run folder"
        ),
        lambda c, w: "launch.shared_disk=true",
        Example("cluster=slurm launch.shared_disk=false"),
    ),
    Rule(
        "flags-are-not-settings",
        "cluster.extra_flags leaves alone what Shardway relies on",
        lambda c, w: bool(_repeated(_slurm(c))),
        lambda c, w: (
            f"cluster.extra_flags=[{', '.join(_repeated(_slurm(c)))}] would change what "
            "Shardway relies on"
        ),
        lambda c, w: "cluster.extra_flags=[]",
        Example("cluster=slurm 'cluster.extra_flags=[\"--array=0-3\"]'"),
    ),
)
