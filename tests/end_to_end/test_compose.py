"""Hydra works as its users expect, and every config group option composes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import COMMANDS
from launcher.cluster import preflight
from launcher.config import METHODS, PRECISIONS, STRATEGIES, store
from launcher.config.compose import compose_command_line
from launcher.folders import paths
from tests.helpers.commands import in_process, run, shardway, written


def compose(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["shardway train", *words])
    (config,) = compose_command_line()
    return config


def options() -> list[str]:
    files = sorted(paths.resource("conf").glob("*/*.yaml"))
    return [f"{path.parent.name}={path.stem}" for path in files]


@pytest.mark.parametrize("option", options())
def test_every_conf_file_composes(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(monkeypatch, option, "data.path=x.jsonl")
    group, _, name = option.partition("=")
    if group not in ("experiment", "data", "tracking"):
        assert getattr(config, group).name == name


@pytest.mark.parametrize(
    ("method", "strategy", "precision"), itertools.product(METHODS, STRATEGIES, PRECISIONS)
)
def test_every_combination_passes_or_is_refused_by_the_expected_rule(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str, strategy: str, precision: str
) -> None:
    words = ("model=tiny", f"method={method}", f"strategy={strategy}", f"precision={precision}")
    for ranks in (1, 2):
        config = compose(monkeypatch, *words, f"cluster.nproc_per_node={ranks}")
        rule = None
        if strategy == "single" and ranks == 2:
            rule = "single-is-one-rank"
        elif strategy in ("zero2_offload", "zero3_offload") and precision == "pure_bf16":
            rule = "zero-offload-keeps-fp32"
        if rule is None:
            assert preflight.check(config).size == ranks
        else:
            with pytest.raises(store.ConfigError, match=rule):
                preflight.check(config)


def test_the_demo_uses_lora_and_fsdp_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(monkeypatch, "experiment=demo")
    assert (config.method.name, config.strategy.name) == ("lora", "fsdp")
    assert (config.cluster.cpu_processes, config.method.rank) == (2, 16)
    assert compose(monkeypatch, "experiment=demo", "method.rank=4").method.rank == 4


def test_help_lists_groups_and_commands_and_each_command_has_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = shardway("train", "--help", cwd=tmp_path).stdout
    strategies = "strategy: auto, ddp, fsdp, fsdp_offload, hsdp, single"
    for word in (strategies, "launch.dry_run=true", "--multirun"):
        assert word in said
    assert in_process(monkeypatch) == 0
    listed = capsys.readouterr().out
    for verb in COMMANDS:
        assert f"\n    {verb} " in listed
        if verb != "train":
            assert in_process(monkeypatch, verb, "--help") == 0
            assert capsys.readouterr().out.startswith(f"usage: shardway {verb} ")


def test_cfg_job_prints_the_composed_configuration(tmp_path: Path) -> None:
    done = shardway("train", "--cfg", "job", "--resolve", "method.rank=5", cwd=tmp_path)
    assert yaml.safe_load(done.stdout)["method"]["rank"] == 5
    assert written(tmp_path) == []


def test_a_config_dir_can_add_options_to_groups(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/mine.yaml").write_text(f"name: mine\nname_or_path: {tiny}\n")
    words = ("train", "--config-dir", "conf", "model=mine", "launch.dry_run=true")
    done = shardway(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"name_or_path: {tiny}" in done.stdout
    assert written(tmp_path) == ["conf", "conf/model", "conf/model/mine.yaml"]


def test_a_dry_run_shows_the_command_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    done = shardway(
        "train", "model=tiny", "cluster.nproc_per_node=2", "launch.dry_run=true", cwd=tmp_path
    )
    assert done.returncode == 0
    assert "# 2 ranks on 1 machine, " in done.stdout
    assert "--nproc-per-node=2" in done.stdout
    assert "-m launcher.worker" in done.stdout
    assert written(tmp_path) == []


def test_python_dash_m_runs_the_same_command(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "launcher.train", "method.rank=0"], tmp_path)
    assert done.returncode == 2
    assert "method.rank=0 must be ≥ 1" in done.stderr
