"""`shardway plan` reports how much memory a run will need, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import preflight
from launcher.cluster.gpu_specs import GPUS, spec_named
from launcher.commands import plan, plan_search
from launcher.config import store
from launcher.config.compose import compose_command_line
from launcher.errors import UserError
from launcher.memory import planning, target
from launcher.memory.planning import PlannedRun, make_plannable, plannable_world
from launcher.memory.search import FoundRun, Search
from launcher.memory.target import Target
from launcher.run.auto import Device
from tests.helpers.commands import in_process
from tests.helpers.compose import composed_raw

GB = 10**9
FITTING = PlannedRun(
    label="strategy=fsdp", target="8 × H100, each with 80.00 GB", ranks=8,
    weights=2 * GB, optimizer=GB, activations=20 * GB,
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
    sizes = "data.max_length=32 training.micro_batch_size=1 training.global_batch_size=8"
    assert f"planned with {sizes}" in ddp["notes"] == fsdp["notes"]
    assert 1.8 < ddp["weights"] / fsdp["weights"] < 2
    assert 1.8 < ddp["optimizer"] / fsdp["optimizer"] < 2
    assert (ddp["ranks"], ddp["memory"], ddp["host"]) == (2, 1000, 0)
    assert ddp["peak"] > fsdp["peak"] > 0


def test_a_plan_that_does_not_fit_exits_with_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peak, status in ((79 * GB, 0), (81 * GB, 1)):
        made = dataclasses.replace(FITTING, peak=peak)
        monkeypatch.setattr(plan, "plan_each", lambda configs, targets, made=made: ([made], []))
        assert typed(monkeypatch, "--memory", "80GB") == status
        assert capsys.readouterr().out == f"{plan.format_plan(made)}\n"


def test_host_memory_that_does_not_suffice_exits_with_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loading, status in ((100, 0), (130, 1)):
        made = dataclasses.replace(FITTING, loading=loading * GB, ranks_per_machine=8)

        def planned(configs: Any, targets: list[Target], made: PlannedRun = made) -> Any:
            return [dataclasses.replace(made, host_memory=targets[0].host)], []

        monkeypatch.setattr(plan, "plan_each", planned)
        assert typed(monkeypatch, "--memory", "80GB", "--host-memory", "1TB") == status
        said = capsys.readouterr().out
        assert f"to load, 8 ranks {8 * loading:21,.2f}" in said
        assert ("does not fit into 1,000.00 GB of host memory: 40.00 GB too much" in said) == status


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
    assert capsys.readouterr().err == "--memory much is not a size → 5GB, 500MB or 5GiB\n"


def test_replaced_settings_are_listed_in_notes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"model.name_or_path={tiny}", "training.compile=on", "training.kernels=liger"]
    words += ["model.attention=flash_attention_2", "training.loss=liger"]
    monkeypatch.setattr("sys.argv", ["shardway plan", *words])
    (asked,) = compose_command_line()
    simpler, notes = make_plannable(asked)
    assert notes == [
        "planned with training.compile=off",
        "planned with training.kernels=torch",
        "planned with training.loss=chunked",
        "planned with model.attention=sdpa, not flash_attention_2",
    ]
    assert make_plannable(simpler) == (simpler, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "fits: 50.00 GB of 80.00 GB are left"),
        ({"peak": 79 * GB}, "tight: 1.00 GB of 80.00 GB are left"),
        ({"peak": 81 * GB}, "does not fit into 80.00 GB: 1.00 GB too much"),
        ({"host": 100 * GB}, "in host memory                  100.00  "),
        (
            {"checkpoint": 96 * GB, "checkpoint_files": 8},
            "a checkpoint, on disk              96.00  in 8 files and small ones",
        ),
        (
            {"export": 16 * GB},
            "an export                          16.00  in 4 files and small ones",
        ),
        ({"peak": 70 * GB, "on_cpu": True}, "10.00 GB of 80.00 GB are left for Python"),
        ({"staging": 9 * GB, "ranks_per_machine": 2}, "for async_save, 2 ranks          18.00"),
        ({"gathering": GB}, "to save, on rank 0                1.00"),
        ({"open_files": 1278}, "open files of a rank (ulimit -n)   1,278"),
        ({"peak": 81 * 10**6, "memory": 80 * 10**6}, "does not fit into 80.00 MB: 1.00 MB too"),
        (
            {"memory": None},
            "memory to compare with is not known → --gpu H100, or --memory 80GB",
        ),
    ],
)
def test_the_plan_reports_whether_it_fits(changes: dict[str, Any], said: str) -> None:
    planned = dataclasses.replace(FITTING, **changes)
    assert said in plan.format_plan(planned)
    assert planned.fits is (None if planned.memory is None else "does not" not in said)


def test_the_plan_is_printed_with_bars() -> None:
    assert plan.format_plan(FITTING).splitlines()[:6] == [
        "planned for 8 × H100, each with 80.00 GB",
        "the fullest of 8 ranks                GB",
        "  weights, masters, buffers         2.00  #",
        "  optimizer state                   1.00",
        "  kept for backward                20.00  ##########",
        "  peak, in the backward            30.00  ###############",
    ]


T4 = Device("Tesla T4", True, False, 16 * GB, in_use=10 * GB)


@pytest.mark.parametrize(
    ("cluster", "gpu", "memory", "here", "expected"),
    [
        ({"nproc_per_node": 8}, "H100", None, [T4], "8 × H100, each with 80.00 GB"),
        ({"nproc_per_node": 8}, "A100", 40, [], "8 × A100, each with 40.00 GB"),
        ({}, None, None, [T4] * 2, "2 × Tesla T4, each with 16.00 GB, as in this machine"),
        ({"nproc_per_node": 8}, None, None, [], "8 GPUs that compute in bf16"),
        ({}, None, 80, [], "1 GPU that computes in bf16, with 80.00 GB"),
        (
            {"nproc_per_node": 8, "nodes": 2}, "H200", None, [],
            "16 × H200, each with 141.00 GB, on 2 machines",
        ),
        (
            {"cpu_processes": 2}, None, None, [],
            "2 CPU processes, each with 8.00 GB, as in this machine",
        ),
        ({"cpu_processes": 1}, None, None, [], "1 CPU process, with 16.00 GB, as in this machine"),
        ({"cpu_processes": 2}, None, 80, [], "2 GPUs that compute in bf16, each with 80"),
        ({"cpu_processes": 2}, None, None, [T4], "1 × Tesla T4, with 16.00 GB, as in"),
        ({"name": "slurm", "cpu_processes": 4}, None, None, [T4], "4 CPU processes"),
        ({"name": "slurm", "gpus_per_node": 4}, None, None, [], "4 GPUs that compute in bf16"),
    ],
)  # fmt: skip
def test_a_plan_says_what_it_is_for(
    cluster: dict[str, Any], gpu: str | None, memory: int | None, here: list[Device],
    expected: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every way to name a GPU, or the CPU, with and without a GPU in this machine."""
    monkeypatch.setattr(target, "visible_devices", lambda: here)
    monkeypatch.setattr(target, "usable_memory", lambda: 16 * GB)
    for module in (target, planning, preflight):
        monkeypatch.setattr(module, "visible_gpus", lambda: len(here))
    asked = store.build(composed_raw(cluster=cluster))
    typed = {f"cluster.{key}" for key in cluster}
    spec = spec_named(gpu) if gpu else None
    chosen = target.choose(asked, typed, spec, memory and memory * GB)
    world, notes = plannable_world(asked, chosen)
    assert chosen.describe(world).startswith(expected)
    assert chosen.device.in_use == 0, "a plan compares with all of the memory"
    assert (world.gpus == 0) == ("CPU" in expected)
    is_counted_here = cluster.keys().isdisjoint({"nproc_per_node", "gpus_per_node"}) and not here
    assert bool(notes) == (is_counted_here and "GPU" in expected)
    if notes:
        assert f"cluster.cpu_processes={world.nproc_per_node}, because" in notes[0]


def test_the_ranks_of_a_cpu_share_the_memory_of_the_machine() -> None:
    made = dataclasses.replace(
        FITTING, on_cpu=True, ranks_per_machine=2, memory=40 * GB, host_memory=80 * GB
    )
    assert made.host_peak == 60 * GB
    assert made.fits
    assert not dataclasses.replace(made, staging=11 * GB).fits


def test_the_table_has_one_line_per_run() -> None:
    large = dataclasses.replace(FITTING, label="strategy=ddp", peak=79 * GB, notes=["a note"])
    target, head, *lines = plan.format_table([FITTING, large]).splitlines()
    assert target == "planned for 8 × H100, each with 80.00 GB"
    assert head == "GB of the fullest rank  ranks  weights  optimizer  kept  peak  host"
    assert lines[0].split()[1:] == ["8", "2.00", "1.00", "20.00", "30.00", "0.00", "fits"]
    assert lines[1].split()[-1] == "tight"
    assert lines[2:] == ["a note"]


FOUND = FoundRun(
    overrides=["strategy=fsdp", "training.micro_batch_size=2"],
    tokens_per_second=71_788.4,
    step_seconds=3.6,
    weights=4 * GB,
    optimizer=8 * GB,
    activations=20 * GB,
    peak=50 * GB,
    phase="backward",
    host=0,
    verdict="fits",
)


def test_a_search_prints_what_to_type(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searches: list[Search] = []
    found = [FOUND, dataclasses.replace(FOUND, tokens_per_second=1.0)]

    def run(self: Search, gpu: Any) -> list[FoundRun]:
        searches.append(self)
        return found

    monkeypatch.setattr(Search, "run", run)
    words = [f"model.name_or_path={tiny}", "cluster.nproc_per_node=8", "strategy=fsdp"]
    words += ["--search", "--memory", "80GB", "--gpu", "h100", "--show", "1"]
    assert typed(monkeypatch, *words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2 configurations fit into 80 GB; speeds are estimates for 8 × H100",
        "  tokens/s  peak GB  host GB         to type",
        "    71,788    50.00     0.00  fits   strategy=fsdp training.micro_batch_size=2",
        "and 1 slower ones → --show 2",
        "planned with data.max_length=160 training.global_batch_size=8",
    ]
    assert searches[0].typed == {"model.name_or_path", "cluster.nproc_per_node", "strategy"}
    assert typed(monkeypatch, *words, "--json") == 0
    assert [each["peak"] for each in json.loads(capsys.readouterr().out)] == [50 * GB] * 2
    found.clear()
    assert typed(monkeypatch, *words) == 1
    assert "nothing fits into 80 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--memory", "80GB"],
            "speeds, and this machine has no GPU → --gpu H100",
        ),
        (["--memory", "80GB", "--gpu", "V100"], "--gpu V100 is not known → one of B200, H200"),
    ],
)
def test_a_search_needs_a_known_gpu(
    options: list[str],
    said: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(target, "visible_devices", list)
    monkeypatch.setattr(plan_search, "gpu_name", lambda: None)
    assert typed(monkeypatch, f"model.name_or_path={tiny}", "--search", *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--network", "--show"])
def test_options_of_a_search_are_refused_without_one(
    option: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, f"model.name_or_path={tiny}", option, "100") == 2
    assert f"{option} 100" in (said := capsys.readouterr().err)
    assert "→ add --search" in said


def test_gpus_have_names_of_their_own() -> None:
    assert len({spec.name.lower() for spec in GPUS}) == len(GPUS)
    assert spec_named("a100").bandwidth == 2039
    with pytest.raises(UserError):
        spec_named("H1")
