"""`shardway plan` reports how much memory a run will need, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import plan
from launcher.commands.plan import PlannedRun
from launcher.config.compose import compose_command_line
from tests.helpers.commands import in_process

GB = 10**9
FITTING = PlannedRun(
    label="strategy=fsdp", ranks=8, weights=2 * GB, optimizer=GB, activations=20 * GB,
    peak=30 * GB, phase="backward", host=0, notes=[], memory=80 * GB,
)  # fmt: skip


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    return in_process(monkeypatch, "plan", *words)


@pytest.fixture
def weightless(tiny: Path, tmp_path: Path) -> Path:
    """A model folder that contains only config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    return folder


def test_multiple_runs_are_planned_without_weights(
    weightless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.name_or_path={weightless}", "method=full", "data.max_length=32"]
    words += ["cluster.nproc_per_node=2", "--memory", "1kB", "--json", "--multirun"]
    assert typed(monkeypatch, *words, "strategy=ddp,fsdp,single") == 2
    out, err = capsys.readouterr()
    ddp, fsdp = json.loads(out)  # a refused run does not stop the planning of the others
    assert err.startswith("strategy=single: ")
    assert "[single-is-one-rank]" in err
    assert (ddp["label"], fsdp["label"]) == ("strategy=ddp", "strategy=fsdp")
    assert ddp["fits"] is fsdp["fits"] is False
    assert 1.8 < ddp["weights"] / fsdp["weights"] < 2
    assert 1.8 < ddp["optimizer"] / fsdp["optimizer"] < 2
    assert (ddp["ranks"], ddp["memory"], ddp["host"]) == (2, 1000, 0)
    assert ddp["peak"] > fsdp["peak"] > 0


def test_a_plan_that_does_not_fit_exits_with_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peak, status in ((79 * GB, 0), (81 * GB, 1)):
        made = dataclasses.replace(FITTING, peak=peak)
        monkeypatch.setattr(plan, "plan_each", lambda configs, memory, made=made: ([made], []))
        assert typed(monkeypatch, "--memory", "80GB") == status
        assert capsys.readouterr().out == f"{plan.format_plan(made)}\n"


def test_all_broken_rules_are_reported(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"model.name_or_path={tiny}", "cluster.nproc_per_node=3", "method=lora")
    assert typed(monkeypatch, *words, "method.dora=true", "method.pissa=true") == 2
    said = capsys.readouterr().err
    assert "[batch-divides]" in said
    assert "[pissa-without-dora]" in said


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("optimizer=adamw_paged", "optimizer=adamw"),
        ("strategy.offload_param=nvme", "strategy.offload_param=cpu"),
    ],
)
def test_an_unplannable_setting_is_refused_with_an_alternative(
    word: str,
    way_out: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"model.name_or_path={tiny}", word, "cluster.nproc_per_node=2"]
    if "nvme" in word:
        words += ["strategy=zero3", f"strategy.nvme_path={tmp_path}"]
    assert typed(monkeypatch, *words) == 2
    assert f"→ {way_out}" in capsys.readouterr().err


def test_an_unreadable_model_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    words = (f"model.name_or_path={tmp_path}", "cluster.nproc_per_node=1")
    assert typed(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"model.name_or_path={tmp_path} cannot be read: ")
    assert "no-such-model" in said


def test_an_invalid_memory_size_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, f"model.name_or_path={tiny}", "--memory", "much") == 2
    assert capsys.readouterr().err == "--memory much is not a size; write 5GB, 500MB or 5GiB\n"


def test_replaced_settings_are_listed_in_notes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"model.name_or_path={tiny}", "training.compile=on", "training.kernels=liger"]
    words += ["model.attention=flash_attention_2", "training.loss=liger"]
    monkeypatch.setattr("sys.argv", ["shardway plan", *words])
    (asked,) = compose_command_line()
    simpler, notes = plan._make_plannable(asked)
    assert notes == [
        "planned with training.compile=off",
        "planned with training.kernels=torch",
        "planned with training.loss=chunked",
        "planned with model.attention=sdpa, not flash_attention_2",
    ]
    assert plan._make_plannable(simpler) == (simpler, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "fits: 50.00 GB of 80.00 GB are left"),
        ({"peak": 79 * GB}, "tight: 1.00 GB of 80.00 GB are left"),
        ({"peak": 81 * GB}, "does not fit into 80.00 GB: 1.00 GB too much"),
        ({"host": 100 * GB}, "in host memory                  100.00  "),
        ({"peak": 81 * 10**6, "memory": 80 * 10**6}, "does not fit into 80.00 MB: 1.00 MB too"),
        ({"memory": None}, "this machine has no GPU to compare with → --memory 80GB"),
    ],
)
def test_the_plan_reports_whether_it_fits(changes: dict[str, Any], said: str) -> None:
    planned = dataclasses.replace(FITTING, **changes)
    assert said in plan.format_plan(planned)
    assert planned.fits is (None if planned.memory is None else "does not" not in said)


def test_the_plan_is_printed_with_bars() -> None:
    assert plan.format_plan(FITTING).splitlines()[:5] == [
        "the fullest of 8 rank(s)              GB",
        "  weights, masters, buffers         2.00  #",
        "  optimizer state                   1.00",
        "  kept for backward                20.00  ##########",
        "  peak, in the backward            30.00  ###############",
    ]


def test_the_table_has_one_line_per_run() -> None:
    large = dataclasses.replace(FITTING, label="strategy=ddp", peak=79 * GB, notes=["a note"])
    head, *lines = plan.format_table([FITTING, large]).splitlines()
    assert head == "GB of the fullest rank  ranks  weights  optimizer  kept  peak  host"
    assert lines[0].split()[1:] == ["8", "2.00", "1.00", "20.00", "30.00", "0.00", "fits"]
    assert lines[1].split()[-1] == "tight"
    assert lines[2:] == ["a note"]
