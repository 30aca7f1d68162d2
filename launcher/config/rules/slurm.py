"""The rules of `cluster=slurm`."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.config import Config, store
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.cluster import SlurmConfig
from launcher.config.secrets import secrets_in_script
from launcher.folders.run import RunDir

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


# Options of sbatch that Shardway sets, and their letters.
MANAGED_OPTIONS = (
    *("nodes", "ntasks", "ntasks-per-node", "array", "output", "error", "chdir", "open-mode"),
    *("requeue", "no-requeue", "signal", "export", "export-file", "wrap", "wait", "parsable"),
)
MANAGED_LETTERS = "NnaoeDW"
MEGABYTES = 1024  # a smaller number without a unit was meant as gigabytes


def _managed_flags(cluster: SlurmConfig) -> list[str]:
    matches = [re.match(r"--([a-z-]+)|-(\w)", flag) for flag in cluster.extra_flags]
    return [
        match[0]
        for match in matches
        if match
        # sbatch accepts the beginning of an option, too.
        and (
            any(option.startswith(match[1]) for option in MANAGED_OPTIONS)
            if match[1]
            else match[2] in MANAGED_LETTERS
        )
    ]


def _memory_settings(cluster: SlurmConfig) -> dict[str, str]:
    """The settings of memory that are set, by their name."""
    values = {name: getattr(cluster, name) for name in ("mem", "mem_per_cpu", "mem_per_gpu")}
    return {f"cluster.{name}": value for name, value in values.items() if value is not None}


def _small_memory(cluster: SlurmConfig) -> dict[str, str]:
    """The settings of memory that are a number without a unit, and too small for the megabytes that
    Slurm takes it for."""
    settings = _memory_settings(cluster).items()
    return {
        key: value for key, value in settings if value.isdecimal() and 0 < int(value) < MEGABYTES
    }


def _bad_names(cluster: SlurmConfig) -> str:
    """The settings with what stands there in place of names of variables, without values that may
    be secret."""
    found = []
    for setting in ("secrets", "environment"):
        names = [re.sub(r"=.*", "=…", name, flags=re.DOTALL) for name in getattr(cluster, setting)]
        if bad := [n for n in names if not re.fullmatch(r"[A-Za-z_]\w*", n, re.ASCII)]:
            found.append(f"cluster.{setting}=[{', '.join(bad)}]")
    return ", ".join(found)


def _secrets_in_setup(config: Config) -> list[str]:
    """The variables to which cluster.setup assigns secrets, except in a run that has such lines
    already."""
    cluster = _slurm(config)
    found = secrets_in_script(cluster.setup, cluster.secrets)
    if not found or config.run_dir is None or not RunDir(Path(config.run_dir)).has_config:
        return found
    former = _slurm(store.load(RunDir(Path(config.run_dir)).config)).setup
    return secrets_in_script([line for line in cluster.setup if line not in former])


SLURM_RULES: tuple[Rule, ...] = (
    Rule(
        "one-kind-of-memory",
        "at most one of cluster.mem, cluster.mem_per_cpu and cluster.mem_per_gpu is set",
        lambda c, w: len(_memory_settings(_slurm(c))) > 1,
        lambda c, w: (
            ", ".join(f"{key}={value}" for key, value in _memory_settings(_slurm(c)).items())
            + ": Slurm takes one of them"
        ),
        lambda c, w: " ".join(f"{key}=null" for key in [*_memory_settings(_slurm(c))][1:]),
        Example("cluster=slurm cluster.mem=64G cluster.mem_per_cpu=4G"),
    ),
    Rule(
        "memory-has-a-unit",
        "a memory below 1024 in cluster.mem, mem_per_cpu or mem_per_gpu has its unit",
        lambda c, w: bool(_small_memory(_slurm(c))),
        lambda c, w: (
            ", ".join(f"{key}={value}" for key, value in _small_memory(_slurm(c)).items())
            + " has no unit: Slurm takes it for megabytes"
        ),
        lambda c, w: " ".join(f"{key}={value}G" for key, value in _small_memory(_slurm(c)).items()),
        Example("cluster=slurm cluster.mem=64"),
    ),
    Rule(
        "memory-per-gpu-has-gpus",
        "cluster.mem_per_gpu needs cluster.gpus_per_node",
        lambda c, w: _slurm(c).mem_per_gpu is not None and _slurm(c).gpus_per_node == 0,
        lambda c, w: f"cluster.mem_per_gpu={_slurm(c).mem_per_gpu}, but cluster.gpus_per_node=0",
        lambda c, w: "cluster.mem_per_gpu=null, or cluster.gpus_per_node=8",
        Example("cluster=slurm cluster.mem_per_gpu=100G"),
    ),
    Rule(
        "variables-have-names",
        "cluster.secrets and the keys of cluster.environment are names of variables",
        lambda c, w: bool(_bad_names(_slurm(c))),
        lambda c, w: (
            f"{_bad_names(_slurm(c))}: these must be names of environment variables, and values "
            "come from the environment or from cluster.environment.NAME"
        ),
        lambda c, w: "cluster.secrets=[] cluster.environment={}, or names such as HF_TOKEN",
        Example("cluster=slurm 'cluster.secrets=[\"HF_TOKEN=abc\"]'"),
    ),
    Rule(
        "setup-has-no-secrets",
        "cluster.setup assigns no secret: the run folder keeps its lines",
        lambda c, w: bool(_secrets_in_setup(c)),
        lambda c, w: (
            f"cluster.setup=[… {_secrets_in_setup(c)[0]}=•••]: the run folder would keep the value "
            f"of {', '.join(_secrets_in_setup(c))}"
        ),
        lambda c, w: (
            f"export {_secrets_in_setup(c)[0]} before this command, and put its name in "
            "cluster.secrets instead"
        ),
        Example("cluster=slurm 'cluster.setup=[\"export WANDB_API_KEY=abc\"]'"),
    ),
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
