"""Settings that fit the schema are accepted; all others are named with a suggested fix."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from launcher.config import SECTIONS, reference, store
from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.folders import paths
from tests.helpers.compose import composed, composed_raw

CHECKOUT = Path(__file__).resolve().parents[2]


def problems(**changes: dict[str, Any]) -> list[str]:
    with pytest.raises(store.ConfigError) as refused:
        store.build(composed_raw(**changes))
    return refused.value.problems


def test_defaults_fill_missing_settings() -> None:
    config = store.build(composed_raw(training={"max_steps": "7"}))
    assert isinstance(config.method, LoraConfig)
    assert (config.method.rank, config.method.resolved_alpha()) == (8, 16)
    assert config.training.max_steps == 7, "text from a command line becomes a number"


def test_all_errors_are_reported_at_once() -> None:
    found = problems(
        method={"rnk": 4, "dropout": 1.5},
        optimizer={"learning_rate": "fast"},
        data={"format": "csv"},
        training={"micro_batch_size": 0},
    )
    assert len(found) == 4
    text = "\n".join(found)
    assert "method.rnk is not a setting; did you mean method.rank?" in text
    assert "optimizer.learning_rate=fast" in text
    assert "data.format=csv must be one of auto, alpaca, sharegpt," in text
    assert "training.micro_batch_size=0 must be ≥ 1" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"name": "lorra"}}, "method.name=lorra is not one of full, freeze, lora"),
        ({"model": {"name_or_path": "???"}}, "model.name_or_path is not set"),
        ({"trainnig": {"epochs": 1}}, "trainnig is not a setting; did you mean training?"),
        ({"optimizer": {"betas": [0.9, -1.5]}}, "optimizer.betas=-1.5 must be ≥ 0"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0.0 must be > 0"),
    ],
)
def test_each_error_has_its_own_message(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in "\n".join(problems(**changes))


def test_a_setting_of_another_choice_names_that_choice() -> None:
    (found,) = problems(scheduler={"name": "constant", "warmup_ratio": 0.1})
    assert found == (
        "scheduler.warmup_ratio is a setting of scheduler=linear, cosine, cosine_with_restarts, "
        "polynomial, constant_with_warmup, inverse_sqrt and not of the selected scheduler; remove "
        "it (~scheduler.warmup_ratio if a file sets it), or choose scheduler=linear"
    )


def test_limits_apply_to_the_entries_of_a_mapping() -> None:
    assert "must be ≥ 1" in "\n".join(problems(method={"rank_pattern": {"q_proj": 0}}))


def test_freezing_and_loading_keep_every_value(tmp_path: Path) -> None:
    config = store.build(composed_raw(method={"rank": 3, "target_modules": ["q_proj"]}))
    text = store.dump(config)
    assert "!!" not in text
    assert "${" not in text
    (tmp_path / "config.yaml").write_text(text)
    assert store.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "steps",
    ["&a [*a]", "[" + ", ".join(["*l"] * 9) + "]"],
)
def test_a_frozen_file_with_aliases_is_damaged(tmp_path: Path, steps: str) -> None:
    file = tmp_path / "config.yaml"
    frozen = store.dump(composed()).replace("max_steps: null", f"max_steps: {steps}")
    file.write_text("x: &l [1]\n" + frozen)
    with pytest.raises(UserError, match="repeats a part by an alias"):
        store.load(file)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${training.seed}", "${"])
def test_a_number_in_a_frozen_file_is_no_reference(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.yaml"
    frozen = store.dump(composed()).replace("max_steps: null", f"max_steps: '{value}'")
    file.write_text(frozen)
    with pytest.raises(UserError, match=r"training\.max_steps="):
        store.load(file)


def test_the_fingerprint_depends_on_values_and_not_on_the_folder() -> None:
    config = store.build(composed_raw())
    assert store.fingerprint(config) == store.fingerprint(dataclasses.replace(config, run_dir="x"))
    other = store.build(composed_raw(method={"rank": 9}))
    assert store.fingerprint(config) != store.fingerprint(other)


def conf_files() -> list[Path]:
    return sorted(paths.resource("conf").glob("*/*.yaml"))


@pytest.mark.parametrize("path", conf_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_conf_file_starts_with_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# shardway ")
    assert f"{path.parent.name}={path.stem}" in first


@pytest.mark.parametrize(
    "path",
    [path for path in conf_files() if path.parent.name != "experiment"],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_conf_file_lists_all_settings_with_their_defaults(path: Path) -> None:
    """Hydra accepts an override only of a key that a file lists."""
    values = yaml.safe_load(path.read_text())
    for base in values.pop("defaults", ["_self_"])[:-1]:
        values = yaml.safe_load((path.parent / f"{base}.yaml").read_text()) | values
    schema = SECTIONS[path.parent.name]
    if isinstance(schema, dict):
        schema = schema[values["name"]]
    fields = {field.name: field for field in dataclasses.fields(schema)}
    assert values.keys() == fields.keys()
    if path.parent.name in ("method", "strategy", "optimizer", "scheduler", "tracking", "cluster"):
        for name, field in fields.items():
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if name != "name":
                assert values[name] == default, name


def test_the_primary_file_lists_all_settings_of_its_sections() -> None:
    values = yaml.safe_load((paths.resource("conf") / "config.yaml").read_text())
    for section in ("training", "checkpoint", "launch"):
        assert values[section].keys() == {f.name for f in dataclasses.fields(SECTIONS[section])}


def test_the_reference_is_up_to_date() -> None:
    assert (CHECKOUT / "docs" / "configuration.md").read_text() == reference.reference()


def test_composing_and_checking_import_no_torch() -> None:
    code = (
        "import sys; import launcher.train, launcher.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch','transformers','peft','deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_listing_runs_imports_no_hydra() -> None:
    code = "import sys; import launcher.commands.runs; sys.exit('hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Modules that only strategies may use, and the interface that the loop uses instead.
DISTRIBUTION = (
    "torch.distributed", "torch.nn.parallel", "deepspeed", "launcher.distributed",
    "launcher.strategy",
)  # fmt: skip
INTERFACE = {"launcher.strategy.Strategy"}


def names_used(code: str) -> set[str]:
    """Dotted names that code imports or reads from a module, and strings with such a name."""
    tree = ast.parse(code)
    bound: dict[str, str] = {}  # a name in the code → what it was imported as
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {each.name for each in node.names}
            for each in node.names:
                root = each.name.partition(".")[0]
                bound[each.asname or root] = each.name if each.asname else root
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for each in node.names:
                bound[each.asname or each.name] = f"{node.module}.{each.name}"
                used |= {f"{node.module}.{each.name}"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            used |= {bound[first] + dot + rest} if first in bound else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used |= {node.value} if re.fullmatch(r"[\w.]+", node.value) else set()
    return used


def origin(name: str) -> str:
    """The original location of a name imported from one of our modules, which may re-export it."""
    module, _, attribute = name.rpartition(".")
    if not (paths.PACKAGE.parent / f"{module.replace('.', '/')}.py").is_file():
        return name
    value = getattr(importlib.import_module(module), attribute, None)
    if isinstance(value, ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', module)}.{attribute}"


def distribution_in(code: str) -> set[str]:
    used = {name for name in names_used(code) if name not in INTERFACE}
    return {name for name in used if is_distribution(name) or is_distribution(origin(name))}


def is_distribution(name: str) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in DISTRIBUTION)


def test_the_loop_data_and_methods_import_no_distribution() -> None:
    """Not directly, under another name, or through our modules: only strategies may use it."""
    package = paths.PACKAGE
    files = [
        package / "training/loop.py",
        *(package / "data").glob("*.py"),
        *(package / "method").glob("*.py"),
    ]
    assert len(files) > 20
    for path in files:
        assert distribution_in(path.read_text()) == set(), path


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "import torch as t\ndef f():\n    return t.distributed.get_rank()",
        "from launcher.strategy.base import dist",
        "from launcher.checkpoint.dcp import dist",
        "from launcher.checkpoint.load import FileSync",
        "import importlib\nimportlib.import_module('torch.distributed')",
        "def f():\n    import deepspeed",
    ],
)
def test_every_way_to_import_distribution_is_detected(code: str) -> None:
    assert distribution_in(code)
