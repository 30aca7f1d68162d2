"""The train tab as settings: what is shown, what it begins with, and the overrides of what was
typed. Knows no widgets and imports no torch."""

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

from launcher import paths, rules, train
from launcher.config import SECTIONS, Config, store
from launcher.config.data import HUB, DataConfig
from launcher.config.rule import World
from launcher.data import files, source
from launcher.errors import UserError
from launcher.ui import grammar
from launcher.ui.places import Places

Values = dict[str, Any]  # setting, or group of conf/ → what the page has: text, or a tick

# What stands on the page, in its order; the rest of docs/configuration.md is typed as overrides.
GROUPS: dict[str, tuple[str, ...]] = {
    "Model and data": (
        *("model", "model.name_or_path", "data", "data.path", "data.dataset_info", "data.name"),
        *("data.template", "data.max_length", "data.train_on", "data.packing", "data.eval_rows"),
    ),
    "Method": (
        *("method", "method.rank", "method.alpha", "method.dropout", "method.target_modules"),
        *("method.bits", "method.quant_type", "method.rslora", "method.dora", "method.pissa"),
        *("method.plus_ratio", "method.adapter", "method.layers", "method.modules"),
        "method.extra_modules",
    ),
    "Strategy and precision": (
        *("strategy", "precision", "strategy.shard_size", "strategy.reshard_after_forward"),
        *("strategy.offload", "strategy.offload_optimizer", "strategy.offload_param"),
        *("training.activation_checkpointing", "training.loss", "training.kernels"),
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
    ),
}
FIELDS = tuple(key for keys in GROUPS.values() for key in keys)
CHOSEN = tuple(key for key in FIELDS if key in SECTIONS)  # files of conf/, such as method=lora
ACCUMULATION = "accumulation"  # no setting: global_batch_size follows from it and the ranks
OURS = ("model.name_or_path", "data.path")  # empty: as the chosen file of conf/ says
# What would run a command or another's code stands in a site's files, not on a page.
FROM_FILES = (
    *("cluster.setup", "cluster.extra_flags", "cluster.environment", "cluster.container"),
    *("cluster.container_python", "model.trust_remote_code", "strategy.extra", "resume_force"),
    *("run_dir", "launch", "hydra", "experiment"),
)
OVERRIDE = re.compile(r"(\+\+|\+|~)?([a-z][\w.]*)(=(.*))?", re.ASCII | re.DOTALL)
_HYDRA = threading.Lock()  # it composes by a global
_LOOKED_AT: dict[Any, list[str]] = {}  # the newest data section and its files → what is wrong


@dataclass(frozen=True)
class Look:
    """What is known of the values on the page."""

    overrides: list[str]
    config: Config | None = None
    world: World | None = None
    problems: list[str] = field(default_factory=list)

    def command(self, run: str | None) -> str:
        """The line that does in a terminal what Start does."""
        words = self.overrides + ([f"run_dir=runs/{run}"] if run else [])
        return shlex.join(["shardway", "train", *words])


def choices(group: str) -> list[str]:
    """The files of a group of conf/."""
    found = sorted(path.stem for path in (paths.beside("conf") / group).glob("*.yaml"))
    return [name for name in found if name != "base"]


@functools.cache
def defaults() -> dict[str, str]:
    """The file of each group that is composed unless another is named."""
    listed = yaml.safe_load((paths.beside("conf") / "config.yaml").read_text())["defaults"]
    return {g: name for each in listed if isinstance(each, dict) for g, name in each.items()}


@functools.lru_cache(maxsize=256)
def _leaves(chosen: tuple[str, ...]) -> dict[str, Any]:
    with _HYDRA:
        return store.leaves(rules.compose(list(chosen)))


def leaves_with(chosen: Mapping[str, str]) -> dict[str, Any]:
    """Every setting by its override, with these files of conf/ and nothing typed."""
    return _leaves(tuple(f"{group}={name}" for group, name in chosen.items()))


def begun(chosen: Mapping[str, str] | None = None) -> Values:
    """The values that files of conf/ give, one of each group that `chosen` does not name as the
    defaults have it. Settings that the chosen ones do not have are left out."""
    files = {group: defaults()[group] for group in CHOSEN} | dict(chosen or {})
    leaves = leaves_with(files)
    values: Values = {key: shown(leaves[key]) for key in FIELDS if key in leaves}
    values |= {key: "" for key in OURS if _is_ours(str(leaves[key]))}
    return {**files, **values, ACCUMULATION: "8"}


def _is_ours(path: str) -> bool:
    """Whether a file of conf/ names what is fetched or ships with Shardway: nobody types that."""
    return any(Path(path).is_relative_to(folder) for folder in (paths.cache(), paths.PACKAGE))


def shown(value: Any) -> Any:
    """A setting's value as the page has it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def overrides_of(values: Values, more: str = "") -> list[str]:
    """What must be typed for `values`: the files that are not the default ones, and what differs
    from what they say. `more` holds further overrides, one a line.

    Raises UserError for what the page does not take.
    """
    chosen = {group: str(values[group]) for group in CHOSEN}
    for group, name in chosen.items():
        if name not in choices(group):
            raise UserError(f"{group}={name} is no file of conf/{group}/")
    start = begun(chosen)
    words = [f"{group}={name}" for group, name in chosen.items() if name != defaults()[group]]
    for key, begins in start.items():
        value = values[key] if key in values else begins
        value = value.strip() if isinstance(value, str) else value
        if key not in CHOSEN and key != ACCUMULATION and value != begins:
            words.append(f"{key}={grammar.written(key, value)}")
    for word in words:
        _refuse_interpolation(word)
    return words + [_taken(line.strip()) for line in more.splitlines() if line.strip()]


def _taken(line: str) -> str:
    """An override that was typed as such."""
    _refuse_interpolation(line)
    match = OVERRIDE.fullmatch(line)
    if match is None:
        raise UserError(f"{line} is no override → setting=value, one a line")
    key, value = match[2], match[4]
    if any(key == name or key.startswith(f"{name}.") for name in FROM_FILES):
        raise UserError(
            f"{key} is not taken from a page → a file of conf/, or shardway train in a terminal"
        )
    if "." not in key and not re.fullmatch(r"[\w-]+", value or "", re.ASCII):
        raise UserError(f"{line}: {key} names a file of conf/{key}/, as in {key}=NAME")
    return line


def _refuse_interpolation(word: str) -> None:
    if "$" in word:  # ${oc.env:NAME} reads the server's environment, and Hydra unescapes $\{, too
        raise UserError(f"{word} holds $, which a page does not take → write the value itself")


def look(values: Values, more: str, places: Places) -> Look:
    """Compose what was typed and hold it against schema, roots and rules. Nothing is run."""
    try:
        overrides = overrides_of(values, more)
    except UserError as error:
        return Look([], problems=[str(error)])
    try:
        with _HYDRA:
            config = rules.compose(overrides)
        world = train.world_of(config)
        if size := _global_batch(values, config, world, more):
            training = dataclasses.replace(config.training, global_batch_size=size)
            config = dataclasses.replace(config, training=training)
            overrides.append(f"training.global_batch_size={size}")
        if refused := list(places.refusals(config)) or list(places.refusals_within(config)):
            return Look(overrides, None, world, refused)
        problems = [*train.rule_problems(config, world), *_data_problems(config.data)]
        return Look(overrides, config, world, problems)
    except store.ConfigError as error:
        return Look(overrides, problems=error.problems)
    except UserError as error:
        return Look(overrides, problems=[str(error)])
    except (HydraException, OmegaConfBaseException) as error:
        return Look(overrides, problems=[train.hydra_sentence(error)])


def _data_problems(data: DataConfig) -> list[str]:
    """What a look into the files says; the same files are read once, not at every key."""
    try:
        named = [each.path for each in source.sources_of(data).values()]
        paths = [p for p in (*named, data.eval_path) if p and not p.startswith(HUB)]
        found = [file for path in paths for file in files.find(path, text=True)]
        found += [Path(data.dataset_info)] if data.dataset_info else []
        looks = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in found)
    except (UserError, OSError):  # quickly said, and in the same words
        return source.problems(data)
    key = (yaml.safe_dump(dataclasses.asdict(data)), looks)
    if (problems := _LOOKED_AT.get(key)) is None:
        problems = source.problems(data)
        _LOOKED_AT.clear()
        _LOOKED_AT[key] = problems
    return problems


def _global_batch(values: Values, config: Config, world: World, more: str) -> int | None:
    """Rows a step by accumulation and ranks; None where they are typed as such, or the file's."""
    text = str(values[ACCUMULATION]).strip()
    if "training.global_batch_size=" in more:
        return None
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise UserError(f"accumulation={text}: forwards a step are a number from 1 on")
    size = int(text) * world.size * config.training.micro_batch_size
    return size if size != config.training.global_batch_size else None


def group_of(problem: str) -> str | None:
    """The group of the page beside which a sentence belongs: that of the first setting in it."""
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
    """The overrides that the sentences say would mend them."""
    found = [re.search(r" → (.*) \[[\w-]+\]$", problem, re.DOTALL) for problem in problems]
    return [word for match in found if match for word in rules.overrides_of(match[1])]


def apply(values: Values, more: str, overrides: list[str]) -> tuple[Values, str]:
    """`values` and `more` with `overrides`: into a field where there is one, else as a line."""
    changed, lines = dict(values), [line for line in more.splitlines() if line.strip()]
    pairs = [word.partition("=")[::2] for word in overrides]
    for group, name in pairs:  # first: a file brings its own values
        if group in CHOSEN and name in choices(group):
            changed = _chosen(changed, group, name)
    for sign_and_key, text in pairs:
        key = sign_and_key.lstrip("+~")
        if key in CHOSEN:
            continue
        if key in FIELDS and key != ACCUMULATION and "{" not in text:
            changed[key] = grammar.typed(key, text)
        else:
            lines = [line for line in lines if line.partition("=")[0].lstrip("+~") != key]
            lines.append(f"{sign_and_key}={text}")
    return changed, "\n".join(lines)


def _chosen(values: Values, group: str, name: str) -> Values:
    """`values` with another file of a group, which brings its values along."""
    others = {key: value for key, value in values.items() if key.partition(".")[0] != group}
    start = begun({each: str(values[each]) for each in CHOSEN} | {group: name})
    return {**others, **{key: value for key, value in start.items() if key.startswith(group)}}


def switched(values: Values, group: str) -> Values:
    """What the fields of a group's settings become when another file of it is chosen."""
    return _chosen(values, group, str(values[group]))
