"""What changes how a step is computed, on GPUs: it is used, and the losses are those of a plain
PyTorch loop on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from launcher.cluster.devices import has_flash_attention, has_liger
from launcher.distributed.process_group import RankInfo
from launcher.model.attention import fits_varlen
from tests.helpers import parts
from tests.helpers.parts import Case
from tests.helpers.places import GPU, TWO_GPUS, Place, placed
from tests.helpers.pool import RankPool

# All thirteen rows in one step, so that packed and unpacked steps train on the same rows.
STEP: Mapping[str, Any] = {
    "global_batch_size": 16,
    "micro_batch_size": 4,
    "steps": 6,
    "learning_rate": 3e-3,
    "precision": "bf16",
}
BOUND = 2e-2  # of a loss in bf16, relative to fp32. Guessed: no GPU has run this yet.


@dataclass(frozen=True, eq=False)
class Feature:
    name: str
    model: str = "llama"
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the case
    used: Callable[[dict[str, Any]], bool] = lambda found: True
    bound: float = BOUND

    def __str__(self) -> str:
        return self.name


def with_training(**settings: Any) -> dict[str, Any]:
    return {"training_options": settings}


LAYERS = 4  # of the random Llama
PLAIN = Feature("plain", used=lambda f: f["forwards"] == LAYERS and not f["graphs"])
PACKING = Feature("packing", changes={"packing": True}, used=lambda f: f["positions"] < 1)
ODD_HEADS = replace(PACKING, name="packing-odd-heads", model="tiny")
RECOMPUTE = Feature(
    "recompute",
    changes=with_training(activation_checkpointing="full"),
    used=lambda f: f["forwards"] == 2 * LAYERS,
)
COMPILE = Feature("compile", changes=with_training(compile="on"), used=lambda f: f["graphs"] > 0)
PACKED_AND_COMPILED = replace(
    COMPILE, name="packing-compile", changes={"packing": True, **COMPILE.changes}
)
WHOLE_LOSS = Feature("whole-loss", changes=with_training(loss="whole"))
# A token whose two best experts are nearly equal goes to another one after rounding.
EXPERTS = Feature("experts", model="experts", bound=5e-2)
FLASH = Feature("flash-attention", changes={"model_options": {"attention": "flash_attention_2"}})
LIGER_LOSS = Feature("liger-loss", changes=with_training(loss="liger"))
LIGER_KERNELS = Feature(
    "liger-kernels", changes=with_training(kernels="liger"), used=lambda f: f["liger"] > 0
)

Cell = tuple[Feature, str, str]  # method, strategy
CELLS: list[Cell] = [
    *((PLAIN, "full", strategy) for strategy in ("ddp", "fsdp", "zero3")),
    *((PACKING, "lora", strategy) for strategy in ("ddp", "fsdp", "zero3")),
    (PACKING, "qlora", "fsdp"),
    (ODD_HEADS, "lora", "ddp"),
    *((RECOMPUTE, "full", strategy) for strategy in ("fsdp", "zero2", "zero3")),
    (COMPILE, "lora", "ddp"),
    (COMPILE, "full", "fsdp"),
    (PACKED_AND_COMPILED, "lora", "fsdp"),
    (WHOLE_LOSS, "full", "fsdp"),
    *((EXPERTS, "full", strategy) for strategy in ("ddp", "fsdp", "hsdp", "zero2", "zero3")),
    *((EXPERTS, "lora", strategy) for strategy in ("fsdp", "zero3", "zero3_offload")),
    *((FLASH, "lora", strategy) for strategy in ("fsdp", "zero3")),
    *((LIGER_LOSS, "full", strategy) for strategy in ("fsdp", "zero3")),
]
NEEDS = {FLASH: has_flash_attention, LIGER_LOSS: has_liger, LIGER_KERNELS: has_liger}
ON_CPU: list[Cell] = [
    (PACKING, "lora", "fsdp"),
    (RECOMPUTE, "full", "zero3"),
    (EXPERTS, "full", "zero3"),
]


def observed(rank_info: RankInfo, case: Case) -> dict[str, Any]:
    """Losses; graphs that were compiled; forwards of attention layers per micro-batch; positions
    of the first step; modules of Liger; devices of the buffers."""
    torch._dynamo.reset()
    counters.clear()
    train_state, loader = parts.set_up(rank_info, case)
    model, recorder, calls = train_state.strategy.model, parts.Recorder(), []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda *_: calls.append(1))
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    batches = [loader.step_batch(step).micro_batches for step in range(case.steps)]
    return {
        "losses": recorder.column("loss"),
        "graphs": counters["stats"]["unique_graphs"],
        "forwards": len(calls) // sum(map(len, batches)),
        "positions": sum(batch.input_ids.numel() for batch in batches[0]),
        "liger": sum("iger" in repr(vars(each).get("forward")) for each in model.modules()),
        "buffers": {buffer.device.type for buffer in model.buffers()},
    }


def case_of(place: Place, models: dict[str, Path], data: Path, cell: Cell) -> Case:
    feature, method, strategy = cell
    return Case(
        models[feature.model], data, method=method, strategy=strategy,
        strategy_options=place.options(strategy), **{**STEP, **feature.changes},
    )  # fmt: skip


def check(run: Any, place: Place, models: dict[str, Path], data: Path, cell: Cell) -> None:
    feature, method, _ = cell
    if feature in NEEDS and not NEEDS[feature]():
        pytest.skip(f"{feature} needs a package that is not installed")
    plain = Case(models[feature.model], data, method=method, **STEP)
    seen = run(observed, case_of(place, models, data, cell))
    unpacked = sum(run(positions, plain))
    losses = expected(plain)
    for found in seen:
        assert found["losses"] == pytest.approx(losses, rel=feature.bound)
        assert found["buffers"] == {place.device}
    positions_kept = sum(found["positions"] for found in seen) / unpacked
    assert all(feature.used({**found, "positions": positions_kept}) for found in seen), seen
    assert losses[-1] < losses[0] - 0.05


def expected(case: Case) -> list[float]:
    """From a plain loop in fp32, with the weights of a quantized base before they are quantized."""
    method = "lora" if case.method == "qlora" else case.method
    return parts.expected_losses(replace(case, method=method, precision="fp32"))


def positions(rank_info: RankInfo, case: Case) -> int:
    step_batch = case.loader(rank_info.rank, rank_info.world_size).step_batch(0)
    return sum(batch.input_ids.numel() for batch in step_batch.micro_batches)


@pytest.fixture
def all_models(models: dict[str, Path], tiny: Path) -> dict[str, Path]:
    return {**models, "tiny": tiny}


@pytest.mark.parametrize(("place", "cell"), placed(CELLS, ON_CPU))
def test_losses_equal_a_plain_loop(
    run: Any, place: Place, cell: Cell, all_models: dict[str, Path], rows_file: Path
) -> None:
    check(run, place, all_models, rows_file, cell)


@pytest.fixture(scope="module")
def changed() -> Iterator[RankPool]:
    """Ranks of their own: Liger changes the modeling files of a process."""
    pool = RankPool(torch.cuda.device_count(), device="cuda")
    yield pool
    pool.close()


LIGER = [(LIGER_KERNELS, "full", "fsdp"), (LIGER_KERNELS, "lora", "zero3")]


@pytest.mark.skipif(not has_liger(), reason="not installed: pip install 'shardway[liger]'")
@pytest.mark.parametrize(("place", "cell"), placed(LIGER))
def test_liger_kernels_give_the_losses_of_a_plain_loop(
    request: pytest.FixtureRequest, pool: RankPool, place: Place, cell: Cell,
    models: dict[str, Path], rows_file: Path,
) -> None:  # fmt: skip
    def run(function: Any, *words: Any) -> list[Any]:
        found: list[Any] = request.getfixturevalue("changed").run(place.ranks, function, *words)
        return found

    check(run, place, models, rows_file, cell)


def test_the_rules_allow_the_cells(all_models: dict[str, Path], rows_file: Path) -> None:
    for place, cell in itertools.product((GPU, TWO_GPUS), (*CELLS, *LIGER)):
        case = case_of(place, all_models, rows_file, cell)
        assert place.refusals(case.config()) == [], (place, case)


def test_varlen_attention_knows_the_sizes_of_heads_of_real_models() -> None:
    assert all(fits_varlen(torch.bfloat16, size) for size in (64, 80, 96, 128, 256))
    assert not fits_varlen(torch.bfloat16, 12), "of the model `tiny`"
    assert not fits_varlen(torch.float32, 64)
    assert not fits_varlen(torch.float16, 512)
