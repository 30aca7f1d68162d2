"""Offload on GPUs: state is in host memory, and GPU memory is free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from tests.helpers import parts
from tests.helpers.parts import Case
from tests.helpers.places import Place, placed
from tests.helpers.wide import make_wide

SMALL_BUCKETS = {"reduce_bucket_size": 1_000_000}
SPLIT = {**SMALL_BUCKETS, "prefetch_bucket_size": 1_000_000, "persistence_threshold": 0}
OPTIONS: Mapping[str, dict[str, int]] = {"fsdp": {}, "zero2": SMALL_BUCKETS, "zero3": SPLIT}
CELLS = [(method, strategy) for method in ("full", "lora") for strategy in OPTIONS]


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tiny, tmp_path_factory.mktemp("models") / "wide", layers=8)


def measured(rank_info: RankInfo, case: Case) -> dict[str, Any]:
    """After some steps: losses, device of the state, GPU bytes at the peak and between steps."""
    on_gpu = rank_info.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    train_state, loader = parts.set_up(rank_info, case)
    strategy, recorder = train_state.strategy, parts.Recorder()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    state = strategy.state()
    parameters = list(strategy.model.parameters())
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else local_part(p) for p in parameters]
    return {
        "losses": recorder.column("loss"),
        "peak": torch.cuda.max_memory_allocated() - before if on_gpu else 0,
        "between": torch.cuda.memory_allocated() - before if on_gpu else 0,
        "parameters": {tensor.device.type for tensor in held},
        "pinned": on_gpu and all(tensor.is_pinned() for tensor in held),
        "masters": {shard.local.device.type for shard in state.weights.values()},
        "moments": {s.local.device.type for each in state.moments.values() for s in each.values()},
    }


@pytest.mark.parametrize(("place", "cell"), placed(CELLS, on_cpu=[("lora", "zero3")]))
def test_state_is_in_host_memory_and_gpu_memory_is_free(
    run: Any, tiny: Path, request: pytest.FixtureRequest, rows_file: Path, place: Place,
    cell: tuple[str, str],
) -> None:  # fmt: skip
    method, strategy = cell
    case = Case(
        request.getfixturevalue("wide") if place.on_gpu else tiny, rows_file, method=method,
        strategy=strategy, strategy_options=OPTIONS[strategy], precision="bf16",
        learning_rate=1e-4, scheduler="constant", steps=5,
    )  # fmt: skip
    offloaded = dataclasses.replace(case, strategy=f"{strategy}_offload")
    for kept, found in zip(run(measured, case), run(measured, offloaded), strict=True):
        assert found["losses"] == pytest.approx(kept["losses"], rel=1e-3)
        assert kept["masters"] == kept["moments"] == {place.device}
        assert found["masters"] == found["moments"] == {"cpu"}
        if place.on_gpu:
            check_memory(method, strategy, kept, found)


def check_memory(method: str, strategy: str, kept: dict[str, Any], found: dict[str, Any]) -> None:
    if strategy != "zero2":
        assert found["parameters"] == {"cpu"}
        assert found["pinned"]
    if method == "full":
        assert found["peak"] < 0.75 * kept["peak"]
        assert found["between"] < 0.5 * kept["between"]
    elif strategy != "zero2":  # the frozen weights
        assert found["between"] < 0.5 * kept["between"]
