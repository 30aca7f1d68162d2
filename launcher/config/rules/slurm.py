"""The rules of `cluster=slurm`."""

from __future__ import annotations

import re

from launcher.config import Config
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.cluster import SlurmConfig

# sbatch(1), --time: minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]. Plain
# minutes are not accepted: YAML reads 4:00:00 without quotes as the number 14400.
TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
UNLIMITED = ("INFINITE", "UNLIMITED", "0")


def time_limit_seconds(limit: str) -> float | None:
    """The seconds of a time limit in sbatch's format, None if it has another format."""
    if limit.upper() in UNLIMITED:
        return float("inf")
    match = TIME_LIMIT.fullmatch(limit)
    if match is None or limit.isdigit():
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    hours_first = days is not None or len(numbers) == 3
    units = [3600, 60, 1] if hours_first else [60, 1]
    seconds = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return int(days or 0) * 86400 + seconds


def _slurm(config: Config) -> SlurmConfig:
    """The settings of the Slurm job, or defaults that break no rule for another cluster."""
    cluster = config.cluster
    return cluster if isinstance(cluster, SlurmConfig) else SlurmConfig(name="slurm")


def _limit_is_unreadable(config: Config, world: World) -> bool:
    limit = _slurm(config).time
    return limit is not None and time_limit_seconds(limit) is None


def _limit_is_too_short(config: Config, world: World) -> bool:
    cluster = _slurm(config)
    limit = time_limit_seconds(cluster.time) if cluster.time else None
    return limit is not None and cluster.signal_seconds >= limit / 2


def _quarter_of_limit(cluster: SlurmConfig) -> int:
    return max(1, int(time_limit_seconds(cluster.time or "") or 0) // 4)


# Options of sbatch that Shardway sets.
MANAGED_OPTIONS = (
    *("nodes", "ntasks", "ntasks-per-node", "array", "output", "chdir", "open-mode"),
    *("requeue", "no-requeue", "signal", "export", "wrap"),
)


def _managed_flags(cluster: SlurmConfig) -> list[str]:
    matches = (re.match(r"--([a-z-]+)", flag) for flag in cluster.extra_flags)
    return [f"--{match[1]}" for match in matches if match and match[1] in MANAGED_OPTIONS]


SLURM_RULES: tuple[Rule, ...] = (
    Rule(
        "limit-is-readable",
        "cluster.time is hours:minutes:seconds, minutes:seconds or days-hours",
        _limit_is_unreadable,
        lambda c, w: (
            f"cluster.time={_slurm(c).time} is not hours:minutes:seconds, minutes:seconds or "
            "days-hours (in a file put it in quotes: YAML reads 4:00:00 as a number)"
        ),
        lambda c, w: "cluster.time=4:00:00, or cluster.time=1-12",
        Example("cluster=slurm cluster.time=4h"),
    ),
    Rule(
        "signal-leaves-time-to-train",
        "cluster.signal_seconds is less than half of cluster.time",
        _limit_is_too_short,
        lambda c, w: (
            f"cluster.signal_seconds={_slurm(c).signal_seconds} is too long for "
            f"cluster.time={_slurm(c).time}: little time is left for training"
        ),
        lambda c, w: (
            f"cluster.signal_seconds={_quarter_of_limit(_slurm(c))}, or a longer cluster.time"
        ),
        Example("cluster=slurm cluster.time=3:00"),
    ),
    Rule(
        "gpu-type-has-a-number",
        "cluster.gpu_type needs cluster.gpus_per_node",
        lambda c, w: _slurm(c).gpu_type is not None and _slurm(c).gpus_per_node == 0,
        lambda c, w: f"cluster.gpu_type={_slurm(c).gpu_type}, but cluster.gpus_per_node=0",
        lambda c, w: "cluster.gpus_per_node=8, or cluster.gpu_type=null",
        Example("cluster=slurm cluster.gpu_type=h100"),
    ),
    Rule(
        "jobs-can-go-on",
        "a job that is requeued has checkpoints to resume from",
        lambda c, w: (
            c.cluster.name == "slurm"
            and c.checkpoint.content != "all"
            and _slurm(c).requeue_limit > 0
        ),
        lambda c, w: (
            f"checkpoint.content={c.checkpoint.content} cannot be resumed, but "
            f"cluster.requeue_limit={_slurm(c).requeue_limit} requeues the job"
        ),
        lambda c, w: "checkpoint.content=all, or cluster.requeue_limit=0",
        Example("cluster=slurm checkpoint.content=weights"),
    ),
    Rule(
        "jobs-share-a-disk",
        "launch.shared_disk=false is only used if torchrun is started by hand on each machine",
        lambda c, w: c.cluster.name == "slurm" and not c.launch.shared_disk,
        lambda c, w: (
            f"cluster={c.cluster.name} with launch.shared_disk=false: the nodes of a job find each "
            "other through the run folder"
        ),
        lambda c, w: "launch.shared_disk=true",
        Example("cluster=slurm launch.shared_disk=false"),
    ),
    Rule(
        "flags-are-not-settings",
        "cluster.extra_flags contains no options that Shardway sets",
        lambda c, w: bool(_managed_flags(_slurm(c))),
        lambda c, w: (
            f"cluster.extra_flags=[{', '.join(_managed_flags(_slurm(c)))}] would override what "
            "Shardway sets"
        ),
        lambda c, w: "cluster.extra_flags=[]",
        Example("cluster=slurm 'cluster.extra_flags=[\"--array=0-3\"]'"),
    ),
)
