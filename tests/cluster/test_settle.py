"""What is chosen where the command was typed, and what is left to the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import gpus
from launcher.cluster.settle import settle
from launcher.config import Config, store
from launcher.run import resume, started_by
from tests.cluster.test_gpus import ALIKE, GIB, PLAIN, on
from tests.helpers.compose import composed_raw

RANK_OF_TORCHRUN = dict.fromkeys(started_by.RANK_VARIABLES, "0") | {
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
}


def unchosen(tiny: Path, **sections: dict[str, Any]) -> Config:
    whole: dict[str, Any] = {
        "model": {"name_or_path": str(tiny)},
        "strategy": {"name": "auto"},
        "precision": {"name": "auto"},
    }
    return store.build(composed_raw(**{**whole, **sections}))


def chosen(config: Config) -> tuple[str, str]:
    settled = settle(config).config
    return settled.precision.name, settled.strategy.name


@pytest.mark.parametrize(
    ("machine", "listed", "expected"),
    [
        ({}, "", ("fp32", "single")),
        (PLAIN, "0", ("bf16", "single")),
        (PLAIN, "0,1", ("bf16", "ddp")),
        (PLAIN, "0,1,2", ("fp16", "ddp")),  # the third is older
        ({}, "0,1", ("auto", "auto")),  # no driver here, so nobody knows
    ],
)
def test_the_visible_gpus_decide(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, machine: dict[str, list[str]], listed: str,
    expected: tuple[str, str],
) -> None:  # fmt: skip
    on(monkeypatch, machine, listed)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the numbers are the driver's
    assert chosen(unchosen(tiny)) == expected
    if machine and listed == "0,1,2":  # two ranks do not use it
        two = unchosen(tiny, cluster={"nproc_per_node": 2})
        assert chosen(two) == ("bf16", "ddp")


def test_ranks_choose_where_the_driver_does_not_say_which_gpus_they_get(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    on(monkeypatch, PLAIN, "0,1")
    assert chosen(unchosen(tiny)) == ("auto", "auto"), "CUDA may call the older one 0"
    on(monkeypatch, {}, None)
    assert chosen(unchosen(tiny)) == ("fp32", "single")
    monkeypatch.setattr(gpus, "AMD_DRIVER", tmp_path)
    assert chosen(unchosen(tiny)) == ("auto", "auto"), "NVML knows no GPU of AMD"
    on(monkeypatch, {}, "")
    assert chosen(unchosen(tiny)) == ("fp32", "single"), "but it is hidden"


def test_a_small_gpu_gets_shards(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    on(monkeypatch, PLAIN, None)
    model = unchosen(tiny, method={"name": "full"})
    assert chosen(model)[1] == "ddp"
    monkeypatch.setattr("launcher.run.auto.USABLE", 1e-6)
    assert chosen(model)[1] == "fsdp"
    assert 80 * GIB * 1e-6 < 100_000


def test_a_gpu_that_others_use_gets_shards(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    driver = on(monkeypatch, ALIKE, None)
    model = unchosen(tiny, method={"name": "full"})
    assert chosen(model)[1] == "ddp"
    driver.in_use = 80 * GIB - 10**6
    settled = settle(model)
    assert settled.config.strategy.name == "fsdp"
    assert "of every rank's 85.9 GB, 85.9 GB of them in use already; divided" in settled.lines[1]


def test_ranks_on_other_machines_choose_themselves(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    on(monkeypatch, ALIKE, None)
    slurm = unchosen(tiny, cluster={"name": "slurm", "gpus_per_node": 2})
    assert chosen(slurm) == ("auto", "auto")
    assert settle(slurm).lines == []
    assert chosen(unchosen(tiny, model={"name_or_path": "owner/name"})) == ("auto", "auto")
    for name, value in RANK_OF_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(started_by, "why_no_rank", lambda: "left over")
    assert chosen(unchosen(tiny)) == ("bf16", "ddp")
    monkeypatch.setattr(started_by, "why_no_rank", lambda: None)
    assert chosen(unchosen(tiny)) == ("auto", "auto")


def test_auto_differs_from_no_checkpoint(tiny: Path, tmp_path: Path) -> None:
    trained = store.build(composed_raw(model={"name_or_path": str(tiny)}))
    (frozen := tmp_path / "config.yaml").write_text(store.dump(trained))
    assert resume.compare_configs(frozen, unchosen(tiny)) == resume.Differences([], [], [], [])
    other = unchosen(tiny, precision={"name": "bf16"})
    assert resume.compare_configs(frozen, other).breaking == ["precision.name: fp32 → bf16"]
