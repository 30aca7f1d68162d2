"""The settings on the Train tab: their order, initial values, overrides and problems.

Uses no widgets and imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from launcher.cluster import preflight
from launcher.config import SECTIONS, Config, store
from launcher.config.compose import compose, hydra_message
from launcher.config.overrides import overrides_in
from launcher.config.rules.rule import World
from launcher.config.schema.data import HUB, DataConfig
from launcher.data import source
from launcher.data.files import file_rows
from launcher.errors import UserError
from launcher.folders import paths
from launcher.ui import override_syntax
from launcher.ui.roots import Roots

Values = dict[str, Any]  # setting, or group of conf/ → text, or bool for a checkbox

# The fields of the page, in order. Other settings of docs/configuration.md are typed as overrides.
GROUPS: dict[str, tuple[str, ...]] = {
    "Model and data": (
        *("model", "model.name_or_path", "data", "data.path", "data.dataset_info", "data.name"),
        *("data.template", "data.max_length", "data.train_on", "data.packing", "data.eval_rows"),
    ),
    "Method": (
        *("method", "method.rank", "method.alpha", "method.dropout", "method.target_modules"),
        *("method.bits", "method.quant_type", "method.rslora", "method.dora", "method.pissa"),
        *("method.plus_ratio", "method.adapter", "method.layers", "method.modules"),
        *("method.extra_modules", "method.target_router", "training.router_aux_loss"),
    ),
    "Strategy and precision": (
        *("strategy", "precision", "strategy.shard_size", "strategy.reshard_after_forward"),
        *("strategy.offload", "strategy.offload_optimizer", "strategy.offload_param"),
        *("training.activation_checkpointing", "training.loss", "training.kernels"),
        *("training.tf32", "training.deterministic"),
    ),
    "Optimizer and learning rate": (
        *("optimizer", "optimizer.learning_rate", "optimizer.weight_decay", "scheduler"),
        *("scheduler.warmup_steps", "scheduler.warmup_ratio", "scheduler.minimum_rate"),
        *("scheduler.cycles", "scheduler.power", "scheduler.patience"),
    ),
    "Length, batch and saving": (
        *("training.epochs", "training.max_steps", "training.micro_batch_size", "accumulation"),
        *("training.eval_steps", "checkpoint.save_steps", "checkpoint.keep_last"),
        *("training.max_grad_norm", "training.neftune_alpha", "training.seed"),
    ),
    "Where it runs": (
        *("cluster", "cluster.nodes", "cluster.nproc_per_node", "cluster.cpu_processes"),
        *("cluster.gpus_per_node", "cluster.gpu_type", "cluster.partition", "cluster.account"),
        *("cluster.qos", "cluster.time", "cluster.cpus_per_task", "cluster.mem"),
        *("cluster.mem_per_cpu", "cluster.mem_per_gpu"),
    ),
}
FIELDS = tuple(key for keys in GROUPS.values() for key in keys)
HYDRA_GROUPS = tuple(key for key in FIELDS if key in SECTIONS)  # each selects a file: method=lora
ACCUMULATION = "accumulation"  # not a setting; with the ranks it determines global_batch_size
PATH_FIELDS = ("model.name_or_path", "data.path")  # empty: the path in the chosen file of conf/
# Settings that run commands or other people's code must come from files of the site.
FILE_ONLY_KEYS = (
    *("cluster.setup", "cluster.extra_flags", "cluster.environment", "cluster.secrets"),
    *("cluster.container", "cluster.container_python", "model.trust_remote_code"),
    *("strategy.extra", "resume_force", "run_dir", "launch", "hydra", "experiment"),
)
OVERRIDE = re.compile(r"(\+\+|\+|~)?([a-z][\w.]*)(=(.*))?", re.ASCII | re.DOTALL)
_HYDRA_LOCK = threading.Lock()  # Hydra composes through a global singleton
# The latest data section with the state of its files → its problems. One entry at most.
_DATA_PROBLEMS: dict[tuple[str, tuple[tuple[str, int, int], ...]], list[str]] = {}


@dataclass(frozen=True)
class FormCheck:
    """The result of checking the values on the page."""

    overrides: list[str]
    config: Config | None = None  # None if the overrides cannot be composed
    world: World | None = None
    problems: list[str] = field(default_factory=list)

    def command(self, run: str | None) -> str:
        """The terminal command that does the same as Start."""
        words = self.overrides + ([f"run_dir=runs/{run}"] if run else [])
        return shlex.join(["shardway", "train", *words])


def choices(group: str) -> list[str]:
    """The files of a group of conf/."""
    return sorted(path.stem for path in (paths.resource("conf") / group).glob("*.yaml"))


@functools.cache
def default_files() -> dict[str, str]:
    """The file of each group that Hydra composes by default."""
    entries = yaml.safe_load((paths.resource("conf") / "config.yaml").read_text())["defaults"]
    return {g: name for entry in entries if isinstance(entry, dict) for g, name in entry.items()}


@functools.lru_cache(maxsize=256)
def _leaves(group_overrides: tuple[str, ...]) -> dict[str, Any]:
    with _HYDRA_LOCK:
        return store.leaves(compose(list(group_overrides)))


def leaves_with(chosen: Mapping[str, str]) -> dict[str, Any]:
    """All settings by their key, composed from these files of conf/ without other overrides."""
    return _leaves(tuple(f"{group}={name}" for group, name in chosen.items()))


def initial_values(chosen: Mapping[str, str] | None = None) -> Values:
    """The values from files of conf/: those in `chosen`, and the default files of other groups.

    Leaves out settings that the files do not have.
    """
    files = {group: default_files()[group] for group in HYDRA_GROUPS} | dict(chosen or {})
    leaves = leaves_with(files)
    values: Values = {key: to_field(leaves[key]) for key in FIELDS if key in leaves}
    values |= {key: "" for key in PATH_FIELDS if _is_bundled(str(leaves[key]))}
    return {**files, **values, ACCUMULATION: "8"}


def _is_bundled(path: str) -> bool:
    """Whether a path is in the cache or in the package. The page shows no such path."""
    return any(Path(path).is_relative_to(folder) for folder in (paths.cache(), paths.PACKAGE))


def to_field(value: Any) -> bool | str:
    """A setting's value as a field of the page shows it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def overrides_of(values: Values, more: str = "") -> list[str]:
    """The overrides for `values`: files other than the default ones, and settings that differ from
    the chosen files. `more` contains additional overrides, one per line.

    Raises UserError for an override that the page does not accept.
    """
    chosen = {group: str(values[group]) for group in HYDRA_GROUPS}
    for group, name in chosen.items():
        if name not in choices(group):
            raise UserError(f"{group}={name} is not a file of conf/{group}/")
    initial = initial_values(chosen)
    words = [f"{group}={name}" for group, name in chosen.items() if name != default_files()[group]]
    for key, initial_value in initial.items():
        value = values[key] if key in values else initial_value
        value = value.strip() if isinstance(value, str) else value
        if key not in HYDRA_GROUPS and key != ACCUMULATION and value != initial_value:
            words.append(f"{key}={override_syntax.format_field(key, value)}")
    for word in words:
        _refuse_interpolation(word)
    return words + [_check_override(line.strip()) for line in more.splitlines() if line.strip()]


def _check_override(line: str) -> str:
    """Returns the override unchanged. Raises UserError if the page does not accept it."""
    _refuse_interpolation(line)
    match = OVERRIDE.fullmatch(line)
    if match is None:
        raise UserError(f"{line} is not an override → setting=value, one per line")
    key, value = match[2], match[4]
    if any(key == name or key.startswith(f"{name}.") for name in FILE_ONLY_KEYS):
        raise UserError(
            f"{key} cannot be set on the page → a file of conf/, or shardway train in a terminal"
        )
    if "." not in key and not re.fullmatch(r"[\w-]+", value or "", re.ASCII):
        raise UserError(f"{line}: {key} names a file of conf/{key}/, as in {key}=NAME")
    return line


def _refuse_interpolation(word: str) -> None:
    # ${oc.env:NAME} reads the server's environment, and Hydra also unescapes $\{.
    if "$" in word:
        raise UserError(f"{word} contains $, which the page does not accept → the plain value")


def check_form(values: Values, more: str, roots: Roots) -> FormCheck:
    """Compose the overrides and check them against the schema, the roots and the rules.

    Starts nothing and raises nothing: errors become problems of the result.
    """
    try:
        overrides = overrides_of(values, more)
    except UserError as error:
        return FormCheck([], problems=[str(error)])
    try:
        with _HYDRA_LOCK:
            config = compose(overrides)
        world = preflight.get_world(config)
        if size := _global_batch(values, config, world, more):
            training = dataclasses.replace(config.training, global_batch_size=size)
            config = dataclasses.replace(config, training=training)
            overrides.append(f"training.global_batch_size={size}")
        if refusals := list(roots.refusals(config)) or list(roots.refusals_within(config)):
            return FormCheck(overrides, None, world, refusals)
        problems = [
            *preflight.find_problems_without_data(config, world),
            *_data_problems(config.data),
        ]
        return FormCheck(overrides, config, world, problems)
    except store.ConfigError as error:
        return FormCheck(overrides, problems=error.problems)
    except UserError as error:
        return FormCheck(overrides, problems=[str(error)])
    except (HydraException, OmegaConfBaseException) as error:
        return FormCheck(overrides, problems=[hydra_message(error)])


def _data_problems(data: DataConfig) -> list[str]:
    """The problems of the data files. Unchanged files are not read again at every keystroke."""
    try:
        source_paths = [each.path for each in source.resolve_sources(data).values()]
        local = [p for p in (*source_paths, data.eval_path) if p and not p.startswith(HUB)]
        files = [file for path in local for file in file_rows.find(path, text=True)]
        files += [Path(data.dataset_info)] if data.dataset_info else []
        files += [  # it says which files are which split
            readme for path in local if (readme := Path(path) / "README.md").is_file()
        ]
        stats = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    except (UserError, OSError):  # source.find_problems is fast then, and reports the same error
        return source.find_problems(data)
    key = (yaml.safe_dump(dataclasses.asdict(data)), stats)
    if (problems := _DATA_PROBLEMS.get(key)) is None:
        problems = source.find_problems(data)
        _DATA_PROBLEMS.clear()
        _DATA_PROBLEMS[key] = problems
    return problems


def _global_batch(values: Values, config: Config, world: World, more: str) -> int | None:
    """Rows per step, from accumulation and ranks. None if it is typed as an override or equal to
    the one in the config. Raises UserError for an invalid accumulation."""
    text = str(values[ACCUMULATION]).strip()
    if "training.global_batch_size=" in more:
        return None
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise UserError(f"accumulation={text}: forwards per step must be an integer of at least 1")
    size = int(text) * world.size * config.training.micro_batch_size
    return size if size != config.training.global_batch_size else None


def group_of(problem: str) -> str | None:
    """The group of the page that shows a problem: the group of the first setting in its text."""
    for key in re.findall(r"[a-z]+(?:\.\w+)*(?==)", problem):
        for group, keys in GROUPS.items():
            if key in keys:
                return group
    section = re.search(r"\b([a-z]+)\.\w+=", problem)
    if section:
        for group, keys in GROUPS.items():
            if section[1] in keys:
                return group
    return None


def fixes(problems: list[str]) -> list[str]:
    """The overrides that the problems suggest as their fix."""
    matches = [re.search(r" → (.*) \[[\w-]+\]$", problem, re.DOTALL) for problem in problems]
    return [word for match in matches if match for word in overrides_in(match[1])]


def apply_overrides(values: Values, more: str, overrides: list[str]) -> tuple[Values, str]:
    """`values` and `more` after `overrides`: each sets its field, or becomes a line of `more`."""
    changed, lines = dict(values), [line for line in more.splitlines() if line.strip()]
    pairs = [word.partition("=")[::2] for word in overrides]
    for group, name in pairs:  # groups first, because a file brings its own values
        if group in HYDRA_GROUPS and name in choices(group):
            changed = _with_file(changed, group, name)
    for prefixed_key, text in pairs:
        key = prefixed_key.lstrip("+~")
        if key in HYDRA_GROUPS:
            continue
        if key in FIELDS and key != ACCUMULATION and "{" not in text:
            changed[key] = override_syntax.parse_field(key, text)
        else:
            lines = [line for line in lines if line.partition("=")[0].lstrip("+~") != key]
            lines.append(f"{prefixed_key}={text}")
    return changed, "\n".join(lines)


def _with_file(values: Values, group: str, name: str) -> Values:
    """`values` after choosing the file `name` of `group`, with the file's own values."""
    others = {key: value for key, value in values.items() if key.partition(".")[0] != group}
    files = {each: str(values[each]) for each in HYDRA_GROUPS} | {group: name}
    initial = initial_values(files)
    return {**others, **{key: value for key, value in initial.items() if key.startswith(group)}}


def switch_file(values: Values, group: str) -> Values:
    """`values` after the user chose another file of `group`: its settings get the file's values."""
    return _with_file(values, group, str(values[group]))
