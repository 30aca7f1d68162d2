"""Offload tests that need a GPU: state is in host memory, and GPU memory is free."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.distributed import process_group
from launcher.distributed.shards import local_part
from tests.helpers import parts
from tests.helpers.commands import shardway
from tests.helpers.parts import Case
from tests.helpers.wide import make_wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SMALL_BUCKETS = {"reduce_bucket_size": 1_000_000}
SPLIT = {**SMALL_BUCKETS, "prefetch_bucket_size": 1_000_000, "persistence_threshold": 0}
PAIRS = [
    ("fsdp", "fsdp_offload", {}),
    ("zero2", "zero2_offload", SMALL_BUCKETS),
    ("zero3", "zero3_offload", SPLIT),
]


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tiny, tmp_path_factory.mktemp("models") / "wide", layers=8)


def alone(function: Any, *arguments: Any) -> Any:
    """The function's result from a separate process, one rank on the first GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(as_one_rank, function, *arguments).result()


def as_one_rank(function: Any, *arguments: Any) -> Any:
    rank_info = process_group.RankInfo(0, 0, 1, 1, torch.device("cuda", 0))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        process_group.init_process_group(rank_info, dist.HashStore())
        return function(rank_info, *arguments)


def measured(rank_info: process_group.RankInfo, case: Case) -> dict[str, Any]:
    """After some steps: losses, device of the state, GPU bytes at the peak and between steps."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy, recorder = train_state.strategy, parts.Recorder()
    torch.cuda.reset_peak_memory_stats()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    state = strategy.state()
    parameters = list(strategy.model.parameters())
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else local_part(p) for p in parameters]
    return {
        "losses": recorder.column("loss"),
        "peak": torch.cuda.max_memory_allocated(),
        "between": torch.cuda.memory_allocated(),
        "parameters": {tensor.device.type for tensor in held},
        "pinned": all(tensor.is_pinned() for tensor in held),
        "masters": {shard.local.device.type for shard in state.weights.values()},
        "moments": {s.local.device.type for each in state.moments.values() for s in each.values()},
    }


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("without", "offloaded", "options"), PAIRS)
def test_state_is_in_host_memory_and_gpu_memory_is_free(
    wide: Path, rows_file: Path, without: str, offloaded: str, options: Any, method: str
) -> None:
    case = Case(
        wide, rows_file, method=method, strategy=without, strategy_options=options,
        precision="bf16", learning_rate=1e-4, scheduler="constant", steps=5,
    )  # fmt: skip
    on_gpu = alone(measured, case)
    found = alone(measured, dataclasses.replace(case, strategy=offloaded))
    assert found["losses"] == pytest.approx(on_gpu["losses"], rel=1e-3)
    assert on_gpu["masters"] == on_gpu["moments"] == {"cuda"}
    assert found["masters"] == found["moments"] == {"cpu"}
    if offloaded != "zero2_offload":
        assert found["parameters"] == {"cpu"}
        assert found["pinned"]
    if method == "full":
        assert found["peak"] < 0.75 * on_gpu["peak"]
        assert found["between"] < 0.5 * on_gpu["between"]
    elif offloaded != "zero2_offload":  # the frozen weights
        assert found["between"] < 0.5 * on_gpu["between"]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("strategy", ["fsdp_offload", "zero2_offload", "zero3_offload"])
def test_a_run_resumes_where_it_stopped(
    tiny: Path, tmp_path: Path, method: str, strategy: str
) -> None:
    rows = 8 * torch.cuda.device_count()
    options = (
        *("train", "model=tiny", f"method={method}", f"strategy={strategy}", "precision=bf16"),
        f"training.global_batch_size={rows}",
        *("training.epochs=null", "training.max_steps=6", "optimizer.learning_rate=1e-3"),
    )
    commands = (
        ("run_dir=whole",),
        ("run_dir=parts", "training.stop_after_steps=3"),
        ("run_dir=parts", "resume=auto"),
    )
    for command in commands:
        done = shardway(*options, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "on cuda" in done.stdout
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    assert [r["loss"] for r in resumed if "loss" in r] == [r["loss"] for r in whole if "loss" in r]
    done = shardway("consolidate", "parts", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
