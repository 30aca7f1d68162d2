"""The gate: what fits the schema passes, everything else is named with the way out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import paths
from launcher.config import SECTIONS, reference, store
from launcher.config.method import LoraConfig

CHECKOUT = Path(__file__).resolve().parents[2]


def composed(**changes: dict[str, Any]) -> dict[str, Any]:
    """A valid mapping with some sections changed."""
    raw: dict[str, Any] = {
        "model": {"name_or_path": "m"},
        "data": {"path": "d.jsonl"},
        "method": {"name": "lora"},
        "strategy": {"name": "fsdp"},
        "precision": {"name": "fp32"},
        "optimizer": {"name": "adamw"},
        "scheduler": {"name": "cosine"},
        "cluster": {"name": "local"},
    }
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return raw


def problems(**changes: dict[str, Any]) -> list[str]:
    with pytest.raises(store.ConfigError) as refused:
        store.build(composed(**changes))
    return refused.value.problems


def test_defaults_fill_what_is_left_out() -> None:
    config = store.build(composed(training={"max_steps": "7"}))
    assert isinstance(config.method, LoraConfig)
    assert (config.method.rank, config.method.resolved_alpha()) == (8, 16)
    assert config.training.max_steps == 7, "text from a command line becomes a number"


def test_everything_wrong_is_named_at_once() -> None:
    found = problems(
        method={"rnk": 4, "dropout": 1.5},
        optimizer={"learning_rate": "fast"},
        data={"format": "csv"},
        training={"micro_batch_size": 0},
    )
    assert len(found) == 4
    text = "\n".join(found)
    assert "method.rnk is no setting; did you mean method.rank?" in text
    assert "optimizer.learning_rate=fast" in text
    assert "data.format=csv must be one of auto, alpaca, sharegpt," in text
    assert "training.micro_batch_size=0 must be ≥ 1" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"name": "lorra"}}, "method.name=lorra is not one of full, freeze, lora"),
        ({"model": {"name_or_path": "???"}}, "model.name_or_path is not set"),
        ({"trainnig": {"epochs": 1}}, "trainnig is no setting; did you mean training?"),
        ({"optimizer": {"betas": [0.9, -1.5]}}, "optimizer.betas=-1.5 must be ≥ 0"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0.0 must be > 0"),
    ],
)
def test_one_sentence_each(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in "\n".join(problems(**changes))


def test_a_setting_of_another_choice_says_whose_it_is() -> None:
    (found,) = problems(scheduler={"name": "constant", "warmup_ratio": 0.1})
    assert found == (
        "scheduler.warmup_ratio is a setting of scheduler=linear, cosine, cosine_with_restarts, "
        "polynomial, constant_with_warmup, inverse_sqrt and not of the one chosen; leave it out "
        "(~scheduler.warmup_ratio where a file sets it), or choose scheduler=linear"
    )


def test_entries_of_a_mapping_are_added_with_a_plus_sign() -> None:
    for key in ("method.rank_pattern", "method.rank_pattern.q_proj"):
        assert store.unknown(key).endswith("with a plus sign, +method.rank_pattern.NAME=VALUE")
    assert "must be ≥ 1" in "\n".join(problems(method={"rank_pattern": {"q_proj": 0}}))


def test_freezing_and_loading_keep_every_value(tmp_path: Path) -> None:
    config = store.build(composed(method={"rank": 3, "target_modules": ["q_proj"]}))
    text = store.dump(config)
    assert "!!" not in text
    assert "${" not in text
    (tmp_path / "config.yaml").write_text(text)
    assert store.load(tmp_path / "config.yaml") == config


def test_the_fingerprint_sees_values_and_not_the_folder() -> None:
    config = store.build(composed())
    assert store.fingerprint(config) == store.fingerprint(dataclasses.replace(config, run_dir="x"))
    other = store.build(composed(method={"rank": 9}))
    assert store.fingerprint(config) != store.fingerprint(other)


def conf_files() -> list[Path]:
    return sorted(paths.beside("conf").glob("*/*.yaml"))


@pytest.mark.parametrize("path", conf_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_conf_file_begins_with_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# shardway ")
    assert f"{path.parent.name}={path.stem}" in first


@pytest.mark.parametrize(
    "path",
    [path for path in conf_files() if path.parent.name != "experiment"],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_conf_file_lists_all_settings_with_the_schema_s_defaults(path: Path) -> None:
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
    values = yaml.safe_load((paths.beside("conf") / "config.yaml").read_text())
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


def test_the_loop_data_and_methods_name_no_distribution() -> None:
    """Not in imports and not in words: strategies own distribution."""
    package = paths.PACKAGE
    files = [
        package / "loop.py",
        *(package / "data").glob("*.py"),
        *(package / "method").glob("*.py"),
    ]
    for path in files:
        text = path.read_text()
        assert "torch.distributed" not in text, path
        assert "fsdp" not in text.lower().replace("fully_shard", ""), path
