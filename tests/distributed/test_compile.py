"""Compiled layers train like eager ones, compile only a few times, and the trial has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from launcher.distributed.process_group import RankInfo
from launcher.model.compile import compiled_forwards
from launcher.training import compile_auto
from launcher.training.compile_auto import choose_compile
from tests.helpers import parts
from tests.helpers.parts import CPU, Case


def run(rank_info: RankInfo, case: Case, tried: float | None = None) -> dict[str, Any]:
    """Train some steps. `tried`: first choose between compiled and eager layers. Compiled layers
    take this many seconds on rank 0 and 0.9 on the others; eager layers take 1."""
    torch._dynamo.reset()
    counters.clear()
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    found: dict[str, Any] = {"said": None}
    if tried is not None:
        found["said"] = try_both(rank_info, strategy, loader, tried)
    recorder = parts.Recorder()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    return found | {
        "losses": recorder.column("loss"),
        "norms": recorder.column("grad_norm"),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "used": {each.enabled for each in compiled_forwards(strategy.model)} or {False},
    }


def try_both(rank_info: RankInfo, strategy: Any, loader: Any, seconds: float) -> str:
    real = compile_auto._time_pass

    def took(*words: Any) -> float:
        real(*words)
        (used,) = {each.enabled for each in compiled_forwards(strategy.model)}
        if not used:
            return 1.0
        return seconds if rank_info.rank == 0 else 0.9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_auto, "_time_pass", took)
        return choose_compile(strategy, loader.step_batch(0).micro_batches[0], CPU)


WHOLE = pytest.mark.whole
CELLS = [
    pytest.param("full", "fsdp", 2, "off", "fp32", marks=WHOLE),
    pytest.param("lora", "fsdp", 2, "full", "fp32", marks=WHOLE),
    pytest.param("lora", "ddp", 2, "off", "bf16", marks=WHOLE),
    pytest.param("qlora", "single", 1, "2", "fp32", marks=WHOLE),
    ("lora", "zero2", 2, "off", "fp32"),
]


@pytest.mark.parametrize(("method", "strategy", "world", "kept", "precision"), CELLS)
def test_compiled_layers_train_like_eager_layers(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    method: str,
    strategy: str,
    world: int,
    kept: str,
    precision: str,
) -> None:
    """Rows have many lengths: one graph is compiled for the first length and one for all others.
    Both are compiled twice, because the first layer's input needs no gradient if the embedding
    is frozen."""
    case = Case(
        tiny, rows_file, method=method, strategy=strategy, precision=precision,
        steps=3, scheduler="constant", training_options={"activation_checkpointing": kept},
    )  # fmt: skip
    plain = ranks.run(world, run, case)
    compiled = ranks.run(world, run, case.with_training(compile="on"))
    bound = 1e-5 if precision == "fp32" else 2e-3
    for before, found in zip(plain, compiled, strict=True):
        assert found["losses"] == pytest.approx(before["losses"], rel=bound)
        assert found["norms"] == pytest.approx(before["norms"], rel=10 * bound)
        assert 1 <= found["graphs"] <= 4
        assert found["breaks"] == 0
        assert before["graphs"] == 0


@pytest.mark.parametrize(("seconds", "used"), [(0.5, True), pytest.param(1.5, False, marks=WHOLE)])
def test_the_slowest_rank_decides_which_layers_are_kept_and_nothing_else_changes(
    ranks: Any, tiny: Path, rows_file: Path, seconds: float, used: bool
) -> None:
    """With dropout, which draws from the random state. Whichever is chosen, the run is then
    equal to the bit to a run with compiling on or off."""
    case = Case(
        tiny, rows_file, strategy="fsdp", method_options={"dropout": 0.1}, steps=2,
        scheduler="constant",
    )  # fmt: skip
    chosen = ranks.run(2, run, case.with_training(compile="auto"), seconds)
    straight = ranks.run(2, run, case.with_training(compile="on" if used else "off"))
    for found, expected in zip(chosen, straight, strict=True):
        assert found["used"] == expected["used"] == {used}
        assert found["losses"] == expected["losses"]
        assert found["norms"] == expected["norms"]
        word, took = ("on", "0.9000") if used else ("off", "1.5000")
        assert found["said"].startswith(f"{word}: forward and backward of 1 × ")
        assert f"{took} s compiled and 1.0000 s not compiled" in found["said"]
