"""The folder of a sweep, and the settings that differ between its runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.run import sweep
from tests.helpers.commands import SHORT, TRAIN_TINY, losses, shardway
from tests.helpers.compose import composed


def test_differences_are_named_by_their_overrides() -> None:
    configs = [
        composed("method=lora", "method.rank=8", "optimizer.learning_rate=1e-4"),
        composed("method=lora", "method.rank=16", "optimizer.learning_rate=3e-4"),
    ]
    assert sweep.differing_settings([*map(dataclasses.asdict, configs)]) == [
        {"method.rank": "8", "optimizer.learning_rate": "0.0001"},
        {"method.rank": "16", "optimizer.learning_rate": "0.0003"},
    ]


def test_another_file_of_a_group_replaces_its_settings_in_the_name() -> None:
    configs = [composed("strategy=fsdp"), composed("strategy=zero3")]
    found = sweep.differing_settings([*map(dataclasses.asdict, configs)])
    assert [each["strategy"] for each in found] == ["fsdp", "zero3"]


def test_a_sweep_has_one_folder_and_one_cluster(tmp_path: Path) -> None:
    config = composed("cluster.nodes=1")
    named = [dataclasses.replace(config, run_dir=str(tmp_path / name)) for name in "ab"]
    with pytest.raises(UserError, match="run_dir differs between the runs of a sweep"):
        sweep.assign_run_dirs(named)
    with pytest.raises(UserError, match="have the same cluster section"):
        sweep.assign_run_dirs([config, composed("cluster.cpu_processes=2")])
    with pytest.raises(UserError, match="exists; choose another"):
        sweep.assign_run_dirs([dataclasses.replace(config, run_dir=str(tmp_path))] * 2)
    placed = sweep.assign_run_dirs([dataclasses.replace(config, run_dir=str(tmp_path / "new"))] * 2)
    assert [each.run_dir for each in placed] == [str(tmp_path / f"new/{at}") for at in (0, 1)]
    assert not (tmp_path / "new").exists()


def test_a_failing_run_does_not_stop_the_others(tiny: Path, tmp_path: Path) -> None:
    rates = "optimizer.learning_rate=1e38,1e-3"
    words = (*TRAIN_TINY, *SHORT, "training.max_steps=8", "training.skipped_steps=3", "--multirun")
    done = shardway(*words, rates, "run_dir=rates", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(losses(tmp_path / "rates/1")) == 8
    table = (tmp_path / "rates/summary.txt").read_text()
    assert table in done.stdout
    assert [line.split()[:3] for line in table.splitlines()] == [
        ["run", "optimizer.learning_rate", "state"],
        ["0", "1e+38", "failed"],
        ["1", "0.001", "finished"],
    ]
    assert json.loads((tmp_path / "rates/sweep.json").read_text())["runs"] == 2
    assert shardway("runs", cwd=tmp_path, patience=60).returncode == 2, "there is no runs/"
    assert "rates/1" in shardway("runs", ".", cwd=tmp_path).stdout


@pytest.mark.whole
def test_a_sweep_resumes_where_it_stopped(tiny: Path, tmp_path: Path) -> None:
    words = (*TRAIN_TINY, *SHORT, "--multirun", "method.rank=2,3", "run_dir=ranks")
    done = shardway(*words, "training.stop_after_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = shardway(*words, cwd=tmp_path)
    assert refused.returncode == 2
    assert "resume=auto" in refused.stderr
    done = shardway(*words, "resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "ranks/summary.txt").read_text().splitlines()[1:]
    assert [line.split()[2:5] for line in lines] == [["finished", "2", "4/4"]] * 2
