"""Every optimizer steps like its library's original under every strategy that allows it, and
resumes from a checkpoint bit for bit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import load
from launcher.distributed.process_group import RankInfo
from launcher.folders.checkpoint import Checkpoint
from tests.helpers import parts
from tests.helpers.checkpoints import END, STOP, run_steps
from tests.helpers.optimizers import BOUNDS, case_of, expected_losses
from tests.helpers.parts import Case
from tests.helpers.pool import message_of_error

NO_OPTIONS: dict[str, Any] = {}
SHARDED = [("hsdp", 4, {"shard_size": 2}), ("fsdp", 3, NO_OPTIONS)]
WHOLE = [("single", 1, NO_OPTIONS), ("ddp", 2, NO_OPTIONS)]
ZERO = [("zero1", 2, NO_OPTIONS), ("zero2", 3, NO_OPTIONS), ("zero3", 3, NO_OPTIONS)]
CELLS = [
    *(("sgd", *layout) for layout in (*WHOLE, SHARDED[1], *ZERO)),
    *(("lion", *layout) for layout in (WHOLE[0], SHARDED[1], ZERO[2])),
    *(("adamw_8bit", *layout) for layout in (*WHOLE, SHARDED[1])),
    *(("adafactor", *layout) for layout in WHOLE),
]
RESUMED = [
    ("full", "sgd", "single", 1, NO_OPTIONS),
    ("full", "sgd", "fsdp", 3, NO_OPTIONS),
    ("lora", "lion", "zero2", 2, NO_OPTIONS),
    ("full", "lion", "zero3", 2, NO_OPTIONS),
    ("full", "adamw_8bit", *SHARDED[0]),
    ("lora", "adamw_8bit", *SHARDED[1]),
    ("full", "adafactor", "ddp", 2, NO_OPTIONS),
    *(
        pytest.param(*cell, marks=pytest.mark.whole)
        for cell in (
            ("full", "sgd", "zero1", 2, NO_OPTIONS),
            ("full", "lion", "fsdp", 2, NO_OPTIONS),
            ("full", "adamw_8bit", "single", 1, NO_OPTIONS),
            ("lora", "adafactor", "single", 1, NO_OPTIONS),
        )
    ),
]


@pytest.mark.parametrize(("optimizer", "strategy", "world", "options"), CELLS)
def test_losses_equal_those_of_the_library(
    ranks: Any, tiny: Path, rows_file: Path, optimizer: str, strategy: str, world: int, options: Any
) -> None:
    plain = case_of(tiny, rows_file, optimizer, method="full", steps=10)
    case = dataclasses.replace(plain, strategy=strategy, strategy_options=options)
    expected = expected_losses(plain)
    assert expected[-1] < expected[0]
    for found in ranks.run(world, parts.losses, case):
        assert found == pytest.approx(expected, rel=BOUNDS[optimizer])


@pytest.mark.parametrize(("method", "optimizer", "strategy", "world", "options"), RESUMED)
def test_stop_and_resume_is_exact_to_the_bit(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
    optimizer: str,
    strategy: str,
    world: int,
    options: Any,
) -> None:
    case = case_of(
        tiny, rows_file, optimizer, method=method, steps=END,
        strategy=strategy, strategy_options=options,
        method_options={"rank": 32} if method == "lora" else {},  # large enough for 8-bit moments
    )  # fmt: skip
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(world, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(world, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.parametrize("optimizer", ["lion"])
def test_moments_resume_under_another_strategy(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, optimizer: str
) -> None:
    case = case_of(tiny, rows_file, optimizer, method="full", strategy="zero3", steps=END)
    whole = ranks.run(2, run_steps, case, tmp_path / "whole", 0, END)[0]
    ranks.run(2, run_steps, case, tmp_path / "parts", 0, STOP)
    case = dataclasses.replace(case, strategy="fsdp")
    found = ranks.run(3, run_steps, case, tmp_path / "parts", STOP, END)[0]
    assert found == pytest.approx(whole[STOP:], rel=BOUNDS[optimizer])


def test_8bit_blocks_resume_only_with_the_same_sharding(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    """single and ddp shard nothing; fsdp on another number of ranks is refused with the reason."""
    case = case_of(tiny, rows_file, "adamw_8bit", method="full", strategy="single", steps=END)
    ranks.run(1, run_steps, case, tmp_path, 0, STOP)
    case = dataclasses.replace(case, strategy="ddp")
    ranks.run(2, run_steps, case, tmp_path, STOP, END)
    case = dataclasses.replace(case, strategy="fsdp")
    for message in ranks.run(2, message_of_error, run_steps, case, tmp_path, STOP, END):
        assert re.search(r"in blocks of 1 shard\(s\) .* has 2 → resume with strategy=ddp", message)


@pytest.mark.parametrize(
    ("saved", "way_out"), [(1, "strategy=ddp (or single)"), (8, "strategy=fsdp on 8 ranks")]
)
def test_blocks_of_another_split_name_the_way_out(saved: int, way_out: str, tmp_path: Path) -> None:
    said = load._describe_other_blocks(Checkpoint(tmp_path / "step-000003"), saved, 2)
    assert f"{saved} shard(s) per tensor, and this run has 2 → resume with {way_out}" in said
    assert f"shardway consolidate {tmp_path}/step-000003 --output FOLDER" in said


def state_dtypes(rank_info: RankInfo, case: Case) -> dict[str, set[torch.dtype]]:
    train_state, loader = parts.set_up(rank_info, case)
    parts.train_step(train_state.strategy, loader.step_batch(0))
    moments = train_state.strategy.state().moments
    return {key: {shard.local.dtype for shard in each.values()} for key, each in moments.items()}


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("fsdp", 3)])
def test_8bit_moments_are_stored_as_bytes(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    case = case_of(tiny, rows_file, "adamw_8bit", method="full", strategy=strategy)
    for found in ranks.run(world, state_dtypes, case):
        assert found["state1"] == found["state2"] == {torch.uint8, torch.float32}
        assert found["absmax1"] == {torch.float32}


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.whole)])
def test_an_optimizer_without_state_resumes(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, method: str
) -> None:
    case = case_of(tiny, rows_file, "sgd", method=method, strategy="fsdp", steps=END)
    case = dataclasses.replace(case, optimizer_options={"momentum": 0.0})
    whole = ranks.run(2, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(2, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(2, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.parametrize(
    ("optimizer", "strategy", "world"),
    [("sgd", "fsdp", 2), ("sgd", "zero1", 2), ("lion", "zero2", 2), ("adamw_8bit", "ddp", 2),
     ("adafactor", "single", 1)],
)  # fmt: skip
def test_no_optimizer_needs_fp32_masters(
    ranks: Any, tiny: Path, rows_file: Path, optimizer: str, strategy: str, world: int
) -> None:
    """Under pure_bf16 the losses of each are close to those in fp32."""
    plain = case_of(tiny, rows_file, optimizer, method="full", steps=10)
    case = dataclasses.replace(plain, strategy=strategy, precision="pure_bf16")
    expected = expected_losses(plain)
    for found in ranks.run(world, parts.losses, case):
        assert found[-1] < found[0]
        assert found == pytest.approx(expected, rel=2e-2)
