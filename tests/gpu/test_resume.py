"""A run on GPUs resumes from its checkpoints, whatever the optimizer, and while one is written.

Kernels add in an order of their own each time, so losses are compared within a bound; to the bit
with training.deterministic=true, in test_commands.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.folders import manifest
from tests.helpers.checkpoints import END, STOP, run_steps, save_every_step, six_steps
from tests.helpers.matrix_checks import ON_GPU
from tests.helpers.parts import Case
from tests.helpers.places import GPU, Place, placed

OPTIMIZERS = [  # (optimizer, method, strategy)
    *(("adamw_paged", "full", strategy) for strategy in ("ddp", "fsdp", "zero2", "zero3")),
    *(("adamw_8bit", method, "fsdp") for method in ("full", "lora")),
    ("adamw_8bit", "full", "ddp"),
    *(("lion", "full", strategy) for strategy in ("fsdp", "zero3")),
    ("sgd", "lora", "fsdp"),
    ("adafactor", "full", "ddp"),
]


def bound(place: Place) -> float:
    return ON_GPU["bf16"] if place.on_gpu else 0.0


def case_of(
    model: Path, data: Path, place: Place, optimizer: str, method: str, strategy: str
) -> Case:
    return six_steps(
        model, data, method, strategy, precision="bf16", optimizer=optimizer,
        strategy_options=place.options(strategy),
    )  # fmt: skip


def test_the_rules_allow_the_optimizers(tiny: Path, rows_file: Path) -> None:
    for cell in OPTIMIZERS:
        assert GPU.refusals(case_of(tiny, rows_file, GPU, *cell).config()) == [], cell


@pytest.mark.parametrize(
    ("place", "cell"), placed(OPTIMIZERS, on_cpu=[("sgd", "lora", "fsdp")], sharded=[])
)
def test_the_state_of_every_optimizer_is_resumed(
    run: Any, tiny: Path, rows_file: Path, tmp_path: Path, place: Place, cell: tuple[str, str, str]
) -> None:
    case = case_of(tiny, rows_file, place, *cell)
    (whole, *_) = run(run_steps, case, tmp_path / "whole", 0, END)
    (first, *_) = run(run_steps, case, tmp_path / "parts", 0, STOP)
    (second, *_) = run(run_steps, case, tmp_path / "parts", STOP, END)
    assert first + second == pytest.approx(whole, rel=bound(place))


SAVED = [("full", "fsdp"), ("lora", "fsdp"), ("lora", "ddp"), ("full", "zero3"), ("full", "hsdp")]


@pytest.mark.parametrize(("place", "cell"), placed(SAVED, on_cpu=[("full", "fsdp")]))
def test_training_continues_while_a_checkpoint_is_written(
    run: Any, tiny: Path, rows_file: Path, tmp_path: Path, place: Place, cell: tuple[str, str]
) -> None:
    method, strategy = cell
    options = place.options(strategy)
    case = six_steps(tiny, rows_file, method, strategy, precision="bf16", strategy_options=options)
    (whole, *_) = run(run_steps, case, tmp_path / "whole", 0, END)
    (losses, *_) = run(save_every_step, case, tmp_path / "saved")
    assert losses == pytest.approx(whole, rel=bound(place))
    for step in range(1, END + 1):
        manifest.check(tmp_path / f"saved/checkpoints/step-{step:06d}/manifest.json")
    name = f"checkpoints/step-{STOP:06d}"
    shutil.copytree(tmp_path / "saved" / name, tmp_path / "parts" / name)
    (rest, *_) = run(run_steps, case, tmp_path / "parts", STOP, END)
    assert rest == pytest.approx(whole[STOP:], rel=bound(place))


CHANGES = [  # (method, strategy before, strategy after)
    ("full", "fsdp", "zero3"),
    ("full", "zero3", "fsdp"),
    ("full", "fsdp", "fsdp_offload"),
    ("full", "zero2_offload", "ddp"),
    ("lora", "zero3", "ddp"),
]


@pytest.mark.parametrize(("place", "cell"), placed(CHANGES, on_cpu=[("full", "fsdp", "zero3")]))
def test_any_strategy_resumes_the_checkpoint_of_another(
    run: Any, tiny: Path, rows_file: Path, tmp_path: Path, place: Place, cell: tuple[str, str, str]
) -> None:
    method, before, after = cell
    case = six_steps(
        tiny, rows_file, method, before, precision="bf16", strategy_options=place.options(before)
    )
    (whole, *_) = run(run_steps, case, tmp_path / "whole", 0, END)
    run(run_steps, case, tmp_path / "parts", 0, STOP)
    case = dataclasses.replace(case, strategy=after, strategy_options=place.options(after))
    (found, *_) = run(run_steps, case, tmp_path / "parts", STOP, END)
    assert found == pytest.approx(whole[STOP:], rel=ON_GPU["bf16"])
