"""The ranks choose together what is auto: through the store, before there is a process group."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.config import Config, store
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run import create
from launcher.run.auto import Device
from launcher.training import choices
from tests.helpers.compose import composed_raw

GPUS = [Device("A100", True, True, 80 * 10**9), Device("T4", True, False, 16 * 10**9)]


def unchosen(tiny: Path, **sections: dict[str, Any]) -> Config:
    return store.build(
        composed_raw(
            model={"name_or_path": str(tiny)},
            strategy={"name": "auto"},
            precision={"name": "auto"},
            training={"max_steps": 1, "global_batch_size": 2},
            launch={"rendezvous_minutes": 0.5},
            **sections,
        )
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def settle(
    monkeypatch: pytest.MonkeyPatch,
    run: RunDir,
    config: Config,
    devices: list[Device],
    ranks_of_machines: Sequence[int] = (),
) -> list[Config | str]:
    """What each rank has afterwards: its configuration, or the message of a refusal. All ranks are
    on one machine, unless `ranks_of_machines` says how many are on each."""
    counts = ranks_of_machines or [len(devices)]
    places = [(at, count) for count in counts for at in range(count)]
    monkeypatch.setattr(choices, "device_of", lambda rank_info: devices[rank_info.rank])
    shared, results = dist.HashStore(), [""] * len(devices)
    lines: list[str] = []

    def rank_of(rank: int) -> None:
        device = torch.device("cuda", rank) if devices[rank].is_gpu else torch.device("cpu")
        local_rank, count = places[rank]
        info = RankInfo(rank, local_rank, len(devices), count, device)
        log = lines.append if rank == 0 else lambda line: None
        try:
            results[rank] = choices.settle(run, config, info, shared, log)  # type: ignore[call-overload]
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*results, *lines]


def test_all_ranks_have_what_all_gpus_know_and_it_is_frozen(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, run: RunDir
) -> None:
    config = create.freeze_config(run, unchosen(tiny))
    first, second, *lines = settle(monkeypatch, run, config, GPUS)
    assert first == second == store.load(run.config)
    assert isinstance(first, Config)
    assert (first.precision.name, first.strategy.name) == ("fp16", "ddp")
    assert first.precision == store.build(composed_raw(precision={"name": "fp16"})).precision
    assert "T4 does not compute in bf16" in lines[0]
    assert lines[1].startswith("strategy=auto: ddp, because a complete train state needs about")
    assert "data.packing=true" in lines[2]


A100 = GPUS[0]
FULL = {"method": {"name": "full"}}


@pytest.mark.parametrize(
    ("devices", "machines", "chosen"),
    [
        ([A100] * 4, (2, 2), ("bf16", "hsdp")),
        ([A100] * 3, (2, 1), ("bf16", "fsdp")),  # no groups of as many ranks
        ([*[A100] * 2, *[GPUS[1]] * 2], (2, 2), ("fp16", "hsdp")),
    ],
)
def test_the_least_of_machines_that_differ_decides(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    run: RunDir,
    devices: list[Device],
    machines: tuple[int, ...],
    chosen: tuple[str, str],
) -> None:
    needed = 900_000  # bytes of the state of the tiny model: a machine of two holds it, no rank
    monkeypatch.setattr("launcher.run.auto.USABLE", needed / (min(d.free for d in devices)))
    batch = {"max_steps": 1, "global_batch_size": len(devices)}
    config = unchosen(tiny, **FULL, data={"max_length": 8})
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **batch))
    frozen = create.freeze_config(run, config)
    *results, _, line, _ = settle(monkeypatch, run, frozen, devices, machines)
    assert results == [store.load(run.config)] * len(devices)
    assert isinstance(results[0], Config)
    assert (results[0].precision.name, results[0].strategy.name) == chosen
    least = "the 16.0 GB of T4, the least of all ranks" if chosen[0] == "fp16" else "every rank's"
    assert least in str(line)


@pytest.mark.parametrize("machines", [(2, 1), (1, 2)])
def test_copies_of_machines_that_differ_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, run: RunDir, machines: tuple[int, ...]
) -> None:
    config = unchosen(tiny, **FULL)
    for shard_size, is_refused in ((None, True), (3, False)):
        strategy = {"name": "hsdp", "shard_size": shard_size}
        hsdp = store.build(composed_raw(strategy=strategy)).strategy
        precise = store.build(composed_raw(precision={"name": "bf16"})).precision
        asked = dataclasses.replace(config, strategy=hsdp, precision=precise)
        results = settle(monkeypatch, run, asked, [A100] * 3, machines)[:3]
        if is_refused:
            assert len(set(map(str, results))) == 1
            assert "these have 1 and 2 ranks → strategy=fsdp" in str(results[0])
        else:
            assert results == [asked] * 3


def test_a_choice_that_breaks_a_rule_is_refused_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, run: RunDir
) -> None:
    config = unchosen(tiny, method={"name": "qlora", "quant_storage": "bfloat16"})
    frozen = create.freeze_config(run, config)
    first, second = settle(monkeypatch, run, frozen, GPUS[1:] * 2)
    assert first == second
    assert "quant-storage-is-not-cast" in str(first)
    assert store.load(run.config) == frozen, "nothing was chosen"


def test_the_file_of_the_engine_is_written_with_the_choice(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, run: RunDir
) -> None:
    zero = store.build(composed_raw(strategy={"name": "zero2"})).strategy
    config = create.freeze_config(run, dataclasses.replace(unchosen(tiny), strategy=zero))
    settle(monkeypatch, run, config, GPUS[:1] * 2)
    assert '"bf16": {\n    "enabled": true' in run.engine_config.read_text()


def test_a_chosen_configuration_needs_no_other_rank(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, run: RunDir
) -> None:
    config = store.build(composed_raw(model={"name_or_path": str(tiny)}))
    (result,) = settle(monkeypatch, run, config, [Device("CPU", False, False, 10**9)])
    assert result == config
    assert not run.config.exists()


def test_a_rank_on_cpu_has_its_share_of_the_host() -> None:
    alone = choices.device_of(RankInfo(0, 0, 1, 1, torch.device("cpu")))
    shared = choices.device_of(RankInfo(0, 0, 4, 4, torch.device("cpu")))
    assert not alone.is_gpu
    assert alone.memory is not None
    assert shared.memory == alone.memory // 4


def test_a_rank_says_what_others_use_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    described = SimpleNamespace(name="A100", major=8, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    rank = RankInfo(0, 0, 1, 1, torch.device("cuda", 0))
    for free, in_use in ((79 * 10**9, 0), (20 * 10**9, 60 * 10**9)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, f=free: (f, 80 * 10**9))
        assert choices.device_of(rank) == Device("A100", True, True, 80 * 10**9, in_use)
