"""`cluster.preflight=true` on real ranks, each of which says that it is a machine of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.config import store
from launcher.distributed.interface import Link
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.io import network
from launcher.machines import measure, preflight
from launcher.machines.facts import digest, gather
from launcher.machines.preflight import Preflight
from tests.helpers.compose import composed_raw
from tests.helpers.pool import RankPool

RANKS = 3
ADDRESS = next((each for each in network.reachable_addresses()), "127.0.0.1")


def wrong_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right + 1


def slow_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    time.sleep(0.2)
    return left @ right


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "wrong": (measure, "product", wrong_product),
    "slow": (measure, "product", slow_product),
    "clock": (measure, "read_clock", lambda: dist.barrier() or time.time() + 3600),
    "folder": (preflight, "_sees_note", lambda file, name: False),
    "data": (preflight, "gather", lambda *given: {**gather(*given), "data": {"rows.jsonl": "odd"}}),
}


def compare_machines(
    rank_info: RankInfo, folder: str, fault: str, on: int
) -> tuple[str, int, list[str]]:
    """(what is refused, status, log lines) on this rank."""
    run, log = RunDir(Path(folder)), list[str]()
    config = store.load(run.config)
    own = dataclasses.replace(rank_info, local_rank=0, local_world_size=1)
    meeting = dist.FileStore(str(run.path / f"store-{fault}"), rank_info.world_size)
    link = Link(f"n{own.rank}", f"m{own.rank}", "eth0", ADDRESS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", f"n{own.rank}")
        if own.rank == on and fault:
            module, name, instead = FAULTS[fault]
            patch.setattr(module, name, instead)
        patch.setattr(preflight, "init_process_group", lambda *given: None)  # there is one
        try:
            preflight.run_preflight(Preflight(run, config, own, meeting, link, log.append))
        except UserError as error:
            return str(error), error.status, log
    return "", 0, log


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> RunDir:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    model, data = {"name_or_path": str(tiny)}, {"path": str(rows)}
    config = store.build(composed_raw(model=model, data=data, cluster={"preflight": True}))
    made = RunDir(tmp_path)
    made.logs.mkdir(parents=True)
    made.config.write_text(store.dump(config))
    return made


def test_good_machines_are_measured(ranks: RankPool, run: RunDir) -> None:
    results = ranks.run(RANKS, compare_machines, str(run.path), "", 0)
    assert [(text, status) for text, status, _ in results] == [("", 0)] * RANKS
    line = results[0][2][-1]
    assert line.startswith(f"preflight: {RANKS} ranks on {RANKS} machines, product ")
    assert "MB/s or more, clocks within" in line
    assert not (run.logs / preflight.NOTE).exists()


@pytest.mark.parametrize(
    ("fault", "on", "said"),
    [
        ("wrong", 2, "n2, rank 2: a matrix product has other bits than on other ranks"),
        ("slow", 1, "n1: a matrix product takes 20"),
        ("clock", 1, "n1: its clock is 3,600"),
        ("folder", 1, "n1 does not see in the run folder what n0 writes there"),
        ("data", 0, "n0: data file rows.jsonl is only here"),
    ],
)
def test_all_ranks_name_the_bad_machine(
    ranks: RankPool, run: RunDir, fault: str, on: int, said: str
) -> None:
    results = ranks.run(RANKS, compare_machines, str(run.path), fault, on)
    assert len({(text, status) for text, status, _ in results}) == 1
    text, status, _ = results[0]
    assert said in text
    assert text.endswith(f"→ --exclude=n{on} (cluster.exclude=n{on})")
    assert status == 69


def test_a_disk_without_space_is_nobody_s_fault(
    ranks: RankPool, run: RunDir, tmp_path: Path
) -> None:
    """The model is a config.json alone, and larger than any disk."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"hidden_size": 1 << 22, "num_hidden_layers": 1, "vocab_size": 1 << 20}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    config = store.load(run.config)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name_or_path=str(model)),
        method=store.build(composed_raw(method={"name": "full"})).method,
    )
    run.config.write_text(store.dump(config))
    results = ranks.run(RANKS, compare_machines, str(run.path), "", 0)
    assert {status for _, status, _ in results} == {2}
    assert "one checkpoint needs about" in results[0][0]


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_each_meets_each_other_once(count: int) -> None:
    rounds = list(measure.tournament(count))
    pairs = [pair for each in rounds for pair in each]
    assert len(set(pairs)) == len(pairs) == count * (count - 1) // 2
    for each in rounds:
        players = [player for pair in each for player in pair]
        assert len(set(players)) == len(players)


def test_a_digest_of_weights_is_that_of_their_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = b'{"a": 1}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    first = digest(file)
    file.write_bytes(file.read_bytes()[:-4] + b"1111")
    assert digest(file) == first, "the weights are not read"
    file.write_bytes(file.read_bytes() + b"1")
    assert digest(file) != first
