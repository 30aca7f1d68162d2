"""Compiled layers train as layers do, are compiled a few times, and trying them leaves no trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from launcher import faster
from launcher.distributed.process_group import Place
from launcher.faster import keep_faster
from launcher.model.compiled import compiled_forwards
from tests.helpers import parts
from tests.helpers.parts import CPU, Case


def run(place: Place, case: Case, tried: float | None = None) -> dict[str, Any]:
    """Train some steps; `tried`: after choosing between both ways, compiled layers taking so many
    seconds on rank 0 and 0.9 on the others, and layers as they are one."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(5 + place.rank)
    strategy, _, loader = parts.set_up(place, case)
    found: dict[str, Any] = {"said": None}
    if tried is not None:
        found["said"] = try_both(place, strategy, loader, tried)
    strategy.model.train()
    stats = [parts.train_step(strategy, loader.window(step)) for step in range(case.steps)]
    return found | {
        "losses": [strategy.sum(each.loss).item() for each in stats],
        "norms": [each.grad_norm.item() for each in stats],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "used": {each.used for each in compiled_forwards(strategy.model)} or {False},
    }


def try_both(place: Place, strategy: Any, loader: Any, seconds: float) -> str:
    real = faster._seconds

    def took(*words: Any) -> float:
        real(*words)
        (used,) = {each.used for each in compiled_forwards(strategy.model)}
        if not used:
            return 1.0
        return seconds if place.rank == 0 else 0.9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster, "_seconds", took)
        return keep_faster(strategy, loader.window(0).micro_batches[0], CPU)


WHOLE = pytest.mark.whole
CELLS = [
    pytest.param("full", "fsdp", 2, "off", "fp32", marks=WHOLE),
    pytest.param("lora", "fsdp", 2, "full", "fp32", marks=WHOLE),
    pytest.param("lora", "ddp", 2, "off", "bf16", marks=WHOLE),
    ("qlora", "single", 1, "2", "fp32"),
    ("lora", "zero2", 2, "off", "fp32"),
]


@pytest.mark.parametrize(("method", "strategy", "world", "kept", "precision"), CELLS)
def test_compiled_layers_train_alike(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    method: str,
    strategy: str,
    world: int,
    kept: str,
    precision: str,
) -> None:
    """Rows have many lengths: graphs are made for the first and for all others, twice, because the
    first layer's input needs no gradient where the embedding is frozen."""
    case = Case(
        tiny, rows_file, method=method, strategy=strategy, activation_checkpointing=kept,
        precision=precision, steps=3,
    )  # fmt: skip
    plain = ranks.run(world, run, case)
    compiled = ranks.run(world, run, dataclasses.replace(case, compiled=True))
    bound = 1e-5 if precision == "fp32" else 2e-3
    for before, found in zip(plain, compiled, strict=True):
        assert found["losses"] == pytest.approx(before["losses"], rel=bound)
        assert found["norms"] == pytest.approx(before["norms"], rel=10 * bound)
        assert 1 <= found["graphs"] <= 4
        assert found["breaks"] == 0
        assert before["graphs"] == 0


@pytest.mark.parametrize(("seconds", "used"), [(0.5, True), pytest.param(1.5, False, marks=WHOLE)])
def test_the_faster_is_kept_by_the_slowest_rank_and_nothing_else_changes(
    ranks: Any, tiny: Path, rows_file: Path, seconds: float, used: bool
) -> None:
    """With dropout, which draws from the random state; compiled or not, the run is then the same to
    the bit as with on or off."""
    case = Case(
        tiny, rows_file, strategy="fsdp", method_options=(("dropout", 0.1),), compiled=True,
        steps=2,
    )  # fmt: skip
    chosen = ranks.run(2, run, case, seconds)
    straight = ranks.run(2, run, dataclasses.replace(case, compiled=used))
    for found, expected in zip(chosen, straight, strict=True):
        assert found["used"] == expected["used"] == {used}
        assert found["losses"] == expected["losses"]
        assert found["norms"] == expected["norms"]
        word, took = ("on", "0.9000") if used else ("off", "1.5000")
        assert found["said"].startswith(f"{word}, for forward and backward of 1 × ")
        assert f"{took} s compiled and 1.0000 s as they are" in found["said"]
