"""Every command line that a page, a header of conf/ or a help text shows can be typed.

Those that train are composed and checked in a dry run, with files where they name some; the others
are parsed by the program that they call.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hydra.errors import HydraException

from launcher import train
from launcher.cli import COMMANDS
from launcher.cluster import preflight
from launcher.config import Config, store
from launcher.config.compose import compose, compose_command_line
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.table import broken_rules
from launcher.errors import UserError
from launcher.folders.model import is_hub_id
from launcher.memory import planning
from tests.helpers.documented import CHECKOUT, Command, commands

# Programs that are not ours, or that change the machine: only their name is checked.
NOT_OURS = {
    "make": "installs; tests/end_to_end/test_readme.py checks its targets",
    "pip": "installs from a registry",
    "ssh": "needs another machine",
    "touch": "of coreutils",
    "mkdir": "of coreutils",
    "cat": "of coreutils",
    "tensorboard": "an optional package",
    "vllm": "an optional package",
    ".venv/bin/python": "runs these tests",
}
# Lines that cannot be typed as they are, and why.
NOT_RUN = {
    "shardway COMMAND [ARGUMENTS]": "names the parts of a command",
    "python -m sglang.launch_server --model-path runs/first/export": "an optional package",
}
# Commands that this machine refuses, by these rules only.
REFUSED = {
    "shardway train optimizer=adamw_paged optimizer.learning_rate=2e-4": "paging-needs-a-gpu",
    "shardway train experiment=one_host_gpus model.name_or_path=path/to/model data.path=my.jsonl "
    "cluster.nproc_per_node=8": "liger-needs-a-gpu",
}
FIELDS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "a question", "output": "an answer"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "messages": {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    },
    "completion": {"prompt": "a question", "completion": "an answer"},
    "text": {"text": "a text"},
}
ROWS = 200  # enough for every example that holds rows out
FIELDS["auto"] = FIELDS["alpaca"]


class Parsed(Exception):
    """A command line was parsed; what it asks for is not done."""


@pytest.fixture
def machine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on a machine without GPUs, with every package and both models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.syspath_prepend(str(CHECKOUT / "tools"))
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    for name, layers in (("tiny", 2), ("smollm2_135m", 30)):
        folder = tmp_path / f"cache/models/{name}"
        for file in tiny.iterdir():
            link(folder / file.name, file)
        settings = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": layers}
        (folder / "config.json").unlink()
        write(folder / "config.json", json.dumps(settings))
    monkeypatch.setattr(preflight, "inspect_machine", lambda config: Machine())
    return tmp_path


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_rows(path: str, format: str, columns: dict[str, str]) -> None:
    """The rows of a source, in the format that it is read in."""
    file, row = Path(path.replace("*", "a")), FIELDS[format]
    rows = [{columns.get(key, key): value for key, value in row.items()}] * ROWS
    if file.suffix == ".txt":
        write(file, "a text\n")
    elif file.suffix == ".json":
        write(file, json.dumps(rows))
    else:
        write(file, "".join(json.dumps(each) + "\n" for each in rows))


def write_files(config: Config, tiny: Path) -> None:
    """Everything that a configuration names."""
    data, model = config.data, Path(config.model.name_or_path)
    if not is_hub_id(config.model.name_or_path) and not model.exists():
        link(model, tiny)
    if data.dataset_info:
        files = {name: {"file_name": f"{name}.json"} for name in data.name.split(",")}
        write(Path(data.dataset_info), json.dumps(files))
        for name in files:
            write_rows(str(Path(data.dataset_info).parent / f"{name}.json"), "alpaca", {})
    sources = data.sources or {data.name: data}
    for source in sources.values():
        if source.path and not Path(source.path).exists():
            write_rows(source.path, source.format, source.columns)
    strategy: Any = config.strategy
    if path := getattr(strategy, "nvme_path", None):
        Path(path).mkdir(parents=True)
    method: Any = config.method
    for folder in [getattr(method, "adapter", None), *getattr(method, "merge_first", [])]:
        if folder:
            adapter = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(model)}
            write(Path(folder) / "adapter_config.json", json.dumps(adapter))
            write(Path(folder) / "adapter_model.safetensors", "")


def write_own_conf(words: list[str], folder: Path) -> None:
    """The files of --config-path and --config-dir."""
    if "--config-path" in words:
        write(folder / "runs/try/config.yaml", store.dump(compose(["model=tiny"])))
    if "--config-dir" in words:
        own = f"name: mine\nname_or_path: {folder}/models/mine\n"
        write(folder / "my_conf/model/mine.yaml", own)


def in_folder(word: str, folder: Path) -> str:
    """An override whose absolute path is in `folder`, where the test may write."""
    return re.sub(r"^([\w.]+=)/", rf"\1{folder}/", os.path.expandvars(word))


def compose_typed(words: list[str]) -> list[Config]:
    if not any(word.startswith("-") for word in words):
        return [compose(words)]  # the same in less time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shardway train", *words])
        return compose_command_line()


def train_dry(words: list[str], folder: Path, tiny: Path) -> None:
    """Compose and check as `shardway train` does. Raises ConfigError with the broken rules."""
    words = [in_folder(word, folder) for word in words]
    if {"--help", "--cfg"} & {*words}:
        with pytest.raises(SystemExit) as left:
            compose_typed(words)
        assert not left.value.code
        return
    write_own_conf(words, folder)
    configs = compose_typed([*words, "launch.dry_run=true"])
    for config in configs:
        write_files(config, tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compose_command_line", lambda: configs)
        assert train.train() == 0


def parse_only(run: Callable[[], Any], *words: str) -> tuple[argparse.Namespace, list[str]]:
    """What the parser of a program makes of `words`; the program goes no further."""
    parsed: list[tuple[argparse.Namespace, list[str]]] = []
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        parsed.append(parse(self, *args, **options))
        raise Parsed

    def refuse_rest(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        parsed.append(parse(self, *args, **options))
        assert parsed[0][1] == [], "unrecognized arguments"
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_args", refuse_rest)
        with pytest.raises(Parsed):
            run()
    return parsed[0]


def check_verb(words: list[str], folder: Path, tiny: Path) -> None:
    verb, *rest = words
    if verb == "train":
        return train_dry(rest, folder, tiny)
    if verb == "--version":
        assert not rest
        return None
    module = importlib.import_module(COMMANDS[verb][0])
    own = rest[: rest.index("--")] if "--" in rest else rest  # the rest is for another program
    options, overrides = parse_only(module.main, f"shardway {verb}", *own)
    if verb == "check" and overrides:
        return train_dry(overrides, folder, tiny)
    if verb in ("data", "plan", "schedule"):
        check_composed(verb, options, [in_folder(word, folder) for word in overrides], tiny)
    return None


def check_composed(verb: str, options: argparse.Namespace, words: list[str], tiny: Path) -> None:
    """The configurations of a verb that takes overrides but starts no run."""
    for config in compose_typed(["--multirun"] * getattr(options, "multirun", False) + words):
        if verb == "data":
            write_files(config, tiny)
        assert verb != "plan" or not broken_rules(config, world_of(config), planning.RULES)
        assert verb != "schedule" or options.steps or config.training.max_steps


def world_of(config: Config) -> World:
    return World.from_config(config, Machine())


def ranks_of(options: list[str]) -> list[str]:
    """The overrides for the ranks that torchrun or sbatch starts."""
    given = argparse.ArgumentParser(allow_abbrev=False)
    given.add_argument("--nodes", "--nnodes", type=int, default=1)
    given.add_argument("--ranks", "--nproc-per-node", "--gpus-per-node", type=int, default=1)
    asked, _ = given.parse_known_args(options)
    return [f"cluster.nproc_per_node={asked.nodes * asked.ranks}"]


def check(command: Command, folder: Path, tiny: Path) -> None:
    """Fails if the command cannot be typed, or raises what refuses it."""
    program, *words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
    if program == "shardway":
        check_verb(words, folder, tiny)
    elif program == "torchrun":
        at = words.index("-m")
        assert words[at + 1] == "launcher.train"
        train_dry([*ranks_of(words[:at]), *words[at + 2 :]], folder, tiny)
    elif program == "sbatch":
        at = words.index("slurm/train.sbatch")
        train_dry(["cluster=slurm", *ranks_of(words[:at]), *words[at + 1 :]], folder, tiny)
    elif "=" in program:  # the rest of the command above it
        train_dry(["cluster=slurm", program, *words], folder, tiny)
    elif program == "bash":
        usage = (CHECKOUT / words[0]).read_text().partition("set -euo pipefail")[0]
        assert all(f"{words[0]} {word}" in usage for word in words[1:])
    else:
        assert program == "python"
        tool = str(CHECKOUT / words[0])
        parse_only(lambda: runpy.run_path(tool, run_name="__main__"), tool, *words[1:])


ALL = commands()
CHECKED = [c for c in ALL if c.line not in NOT_RUN and c.words and c.words[0] not in NOT_OURS]


def test_every_place_and_program_is_read() -> None:
    files = {command.file for command in ALL}
    assert {"README.md", "docs/data.md", "conf/config.yaml", "conf/strategy/ddp.yaml"} <= files
    assert {"launcher/commands/plan.py", "tools/bench_train.py", "slurm/train.sbatch"} <= files
    programs = {command.words[0] for command in CHECKED}
    assert {"shardway", "torchrun", "sbatch", "python"} <= programs


def test_every_exception_is_still_shown() -> None:
    lines, programs = {c.line for c in ALL}, {c.words[0] for c in ALL if c.words}
    assert {*REFUSED, *NOT_RUN} <= lines
    assert {*NOT_OURS} <= programs


@pytest.mark.parametrize("command", CHECKED, ids=lambda c: f"{c.file}: {c.line}")
def test_a_documented_command_can_be_typed(command: Command, machine: Path, tiny: Path) -> None:
    if command.line not in REFUSED:
        check(command, machine, tiny)
        return
    with pytest.raises(store.ConfigError) as refused:
        check(command, machine, tiny)
    assert re.findall(r"\[([\w-]+)\]$", str(refused.value), re.MULTILINE) == [REFUSED[command.line]]


def test_a_command_that_cannot_be_typed_is_caught(machine: Path, tiny: Path) -> None:
    for line in ("shardway train training.max_step=3", "shardway logs runs/x --attemt 1"):
        with pytest.raises((UserError, HydraException, AssertionError)):
            check(Command(line, "x"), machine, tiny)
