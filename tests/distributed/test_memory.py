"""The memory planned with fake tensors is the memory that real ranks use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from launcher.config import Config, store
from launcher.distributed.process_group import RankInfo
from launcher.memory import MemoryUsage
from launcher.memory.dry_run import longest_step_batch, measure
from launcher.memory.mem_tracker import MemTracker
from launcher.memory.planning import plan_run
from launcher.model.load import build_model
from launcher.strategy.precision import precision_of
from launcher.training.build import new_strategy
from tests.helpers.compose import composed_raw

RANKS = 2
OFFLOADED = {"name": "zero3_offload"}
# Method, strategy, precision, more; the first ones are in `make test`.
CELLS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("full", {"name": "fsdp"}, "bf16", {}),
    ("lora", {"name": "zero3"}, "bf16", {"training": {"activation_checkpointing": "full"}}),
    ("qlora", {"name": "fsdp"}, "bf16", {"data": {"packing": True}}),
    ("full", {"name": "zero2"}, "fp32", {}),
    ("lora", {"name": "ddp"}, "bf16", {}),
    ("freeze", {"name": "fsdp"}, "fp16", {}),
    ("full", {"name": "fsdp_offload"}, "pure_bf16", {"optimizer": {"name": "adamw_8bit"}}),
    ("full", {"name": "zero1"}, "bf16", {}),
    ("qlora", {"name": "zero3"}, "bf16", {}),
    ("full", OFFLOADED, "bf16", {}),
    ("full", {"name": "zero2_offload"}, "bf16", {}),
]
IN_EVERY_RUN = 2


def config(folder: Path, cell: tuple[str, dict[str, Any], str, dict[str, Any]]) -> Config:
    method, strategy, precision, more = cell
    training = {"micro_batch_size": 2, "global_batch_size": 4 * RANKS}
    return store.build(
        composed_raw(
            model={"name_or_path": str(folder)},
            data={"max_length": 128, **more.get("data", {})},
            training={**training, **more.get("training", {})},
            method={"name": method},
            strategy=strategy,
            precision={"name": precision},
            optimizer=more.get("optimizer", {}),
            cluster={"nproc_per_node": RANKS},
        )
    )


def taken(rank_info: RankInfo, config: Config) -> MemoryUsage:
    """Measured by a real rank."""
    source, tracker = config.model, MemTracker()
    compute = precision_of(config.precision).compute
    with tracker.track():
        folder, seed = Path(source.name_or_path), config.training.seed
        model, weights = build_model(source, folder, seed, compute, config.data.packing)
        assert weights is not None
        build = functools.partial(new_strategy, config, rank_info)
        return measure(config, model, weights, build, rank_info, tracker)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if at < IN_EVERY_RUN else pytest.mark.whole)
        for at, cell in enumerate(CELLS)
    ],
    ids=[f"{cell[0]}-{cell[1]['name']}-{cell[2]}" for cell in CELLS],
)
def test_the_plan_equals_the_memory_that_ranks_use(
    cell: tuple[str, dict[str, Any], str, dict[str, Any]], tiny: Path, ranks: Any
) -> None:
    asked = config(tiny, cell)
    planned = plan_run(asked)
    real = ranks.run(RANKS, taken, asked)
    fullest = max(real, key=lambda each: each.peak)
    assert planned.ranks == RANKS
    assert planned.peak == pytest.approx(fullest.peak, rel=0.03)
    assert planned.activations == pytest.approx(fullest.activations, rel=0.05)
    assert planned.optimizer == pytest.approx(fullest.optimizer, rel=0.01)
    assert planned.host == pytest.approx(fullest.host, rel=0.01)
    assert (planned.host > 0) == ("offload" in cell[1]["name"])


@pytest.mark.whole
@pytest.mark.parametrize(("on_gpu", "offloaded"), [("fsdp", "fsdp_offload")])
def test_offloading_leaves_no_state_on_the_gpu(on_gpu: str, offloaded: str, tiny: Path) -> None:
    plans = [
        plan_run(config(tiny, ("full", {"name": name}, "bf16", {}))) for name in (on_gpu, offloaded)
    ]
    kept, moved = plans
    state = kept.weights + kept.optimizer
    assert kept.host == 0
    assert moved.host == pytest.approx(state + kept.weights, rel=0.05)  # gradients, too
    assert moved.peak < kept.peak - state


def test_zero3_frees_gathered_weights(tiny: Path, ranks: Any) -> None:
    """If weights were kept from forward to backward, a rank would then hold the full model."""
    at_once = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    kept = {}
    for strategy in (
        {"name": "zero3", "persistence_threshold": 0, "prefetch_bucket_size": 0}
        | {"extra": {"zero_optimization": at_once}},
        {"name": "fsdp"},
    ):
        asked = config(tiny, ("full", strategy, "bf16", {}))
        kept[strategy["name"]] = ranks.run(RANKS, taken, asked)[0].activations
    whole = 2 * 259 * 48 + 2 * 2 * 48 * (2 * 48 + 2 * 24 + 3 * 80)  # bytes of embedding, layers
    assert kept["zero3"] - kept["fsdp"] < 0.2 * whole


def test_rows_are_as_long_as_padding_makes_them(tiny: Path) -> None:
    data = {"max_length": 129, "pad_to_multiple_of": 64}
    step_batch = longest_step_batch(
        config(tiny, ("full", {"name": "ddp"}, "bf16", {"data": data})), RANKS
    )
    assert [batch.input_ids.shape for batch in step_batch.micro_batches] == [(2, 192)] * 2
