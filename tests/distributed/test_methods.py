"""Every variant of a method trains like a plain loop and is saved and exported completely.

test_matrix.py trains each method under every strategy; these are the settings that it omits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launcher.config.schema.model import ModelConfig
from launcher.distributed.process_group import RankInfo
from launcher.folders.checkpoint import Checkpoint
from launcher.io.readers.dcp import read_index
from launcher.method.summary import describe_parameters
from launcher.model.load import build_model
from tests.helpers import checkpoints, parts
from tests.helpers.checkpoints import QUESTION
from tests.helpers.exports import consolidate, make_adapter, stored
from tests.helpers.parts import Case

STEPS = 4
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "freeze-last": ("freeze", {"layers": 1}),
    "freeze-first-and-more": (
        "freeze",
        {"layers": -1, "modules": ["self_attn"], "extra_modules": ["embed_tokens", "norm"]},
    ),
    "dora": ("lora", {"dora": True}),
    "pissa": ("lora", {"pissa": True, "rank_pattern": {"q_proj": 2}}),
    "pissa-exact": ("lora", {"pissa": True, "pissa_iterations": None, "rslora": True}),
    "saved": ("lora", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "patterns": (
        "lora",
        {"rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 3.0}},
    ),
    "merged": (
        "lora",
        {"merge_first": ["ONE", "TWO"], "target_modules": ["q_proj", "up_proj"]},
    ),
    "merged-pissa": ("lora", {"merge_first": ["ONE"], "pissa": True, "pissa_iterations": None}),
    "adapter": ("lora", {"adapter": "ONE"}),
    "adapter-dora-saved": ("lora", {"adapter": "DORA"}),
}  # fmt: skip
LAYOUTS = [
    *((variant, "single", 1) for variant in ("saved", "patterns", "merged", "adapter-dora-saved")),
    *((variant, "zero3", 2) for variant in ("saved", "merged-pissa", "adapter")),
    *(("merged-pissa", *layout) for layout in (("ddp", 2), ("zero1", 2))),
]


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        "ONE": make_adapter(tiny, folder / "one", r=3, target_modules=["q_proj", "down_proj"]),
        "TWO": make_adapter(tiny, folder / "two", r=2, use_rslora=True),
        "DORA": make_adapter(
            tiny, folder / "dora", use_dora=True, target_modules=["v_proj"],
            modules_to_save=["lm_head"],
        ),
    }  # fmt: skip
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def case(tiny: Path, rows_file: Path, adapters: dict[str, str]) -> Any:
    def make(variant: str, strategy: str = "single", **options: Any) -> Case:
        method, settings = VARIANTS[variant]
        filled = {key: _filled(value, adapters) for key, value in settings.items()}
        return Case(
            tiny, rows_file, method=method, strategy=strategy,
            method_options=filled, steps=STEPS, global_batch_size=12, **options,
        )  # fmt: skip

    return make


def _filled(value: Any, adapters: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_filled(each, adapters) for each in value]
    return adapters[value] if isinstance(value, str) and value in adapters else value


def learn(
    rank_info: RankInfo, case: Case, folder: Path, first: int = 0, last: int = STEPS
) -> tuple[list[float], torch.Tensor]:
    """Losses of steps `first` + 1 to `last` and then the logits. Resumes from the checkpoint of
    `first` and saves one at `last`."""
    train_state, losses = checkpoints.train_from(rank_info, case, folder, first, last)
    return losses, checkpoints.answer(train_state.strategy)


@functools.cache
def plain_losses(case: Case) -> list[float]:
    return parts.plain_losses(case)


@pytest.mark.parametrize(("variant", "strategy", "world"), LAYOUTS)
def test_losses_equal_those_of_a_plain_loop(
    ranks: Any, case: Any, variant: str, strategy: str, world: int
) -> None:
    for losses in ranks.run(world, parts.losses, case(variant, strategy)):
        assert losses == pytest.approx(plain_losses(case(variant)), rel=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_weights_give_the_logits_of_the_trained_model(
    ranks: Any, tmp_path: Path, tiny: Path, case: Any, variant: str
) -> None:
    """The export, and an adapter that PEFT loads onto the original base."""
    (losses, expected), _ = ranks.run(2, learn, case(variant, "fsdp"), tmp_path)
    assert losses == pytest.approx(plain_losses(case(variant)), rel=2e-5)
    checkpoint = Checkpoint(tmp_path / f"checkpoints/step-{STEPS:06d}")
    consolidate(checkpoint.path, "--output", tmp_path / "out", "--dtype", "fp32", "--no-verify")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")]
    if checkpoint.adapter is not None:
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        models.append(PeftModel.from_pretrained(base, checkpoint.adapter))
    for model in models:
        with torch.no_grad():
            found = model.eval()(input_ids=QUESTION).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "strategy", "world"), [("saved", "zero3", 2), ("merged-pissa", "fsdp", 2)]
)
def test_stop_and_resume_is_exact_to_the_bit(
    ranks: Any, tmp_path: Path, case: Any, variant: str, strategy: str, world: int
) -> None:
    cell = case(variant, strategy)
    whole = ranks.run(world, learn, cell, tmp_path / "whole")
    ranks.run(world, learn, cell, tmp_path / "parts", 0, 2)
    again = ranks.run(world, learn, cell, tmp_path / "parts", 2)
    for (losses, logits), (rest, answer) in zip(whole, again, strict=True):
        assert losses[2:] == rest
        assert torch.equal(logits, answer)


def test_frozen_weights_are_exported_unchanged(
    ranks: Any, tmp_path: Path, tiny: Path, case: Any
) -> None:
    ranks.run(2, learn, case("freeze-first-and-more", "fsdp"), tmp_path)
    consolidate(tmp_path / f"checkpoints/step-{STEPS:06d}", "--output", tmp_path / "out")
    before, after = stored(tiny), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {n for n in before if n.startswith("model.layers.0.self_attn")}
    assert moved == expected | {"model.embed_tokens.weight", "model.norm.weight"}
    index = read_index(tmp_path / f"checkpoints/step-{STEPS:06d}/model")
    weights = {name for name in index.tensors if name.startswith("model.")}
    assert weights == {f"model.{name}" for name in moved}, "what is trained alone"


def first_logits(rank_info: RankInfo, case: Case) -> torch.Tensor:
    return checkpoints.answer(parts.set_up(rank_info, case)[0].strategy)


@pytest.mark.parametrize(
    ("variant", "strategy"),
    [("dora", "fsdp"), ("pissa", "fsdp"), ("pissa-exact", "zero3"), ("saved", "zero3")],
)
def test_initial_logits_equal_those_of_the_base(
    ranks: Any, tiny: Path, case: Any, variant: str, strategy: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=QUESTION).logits
    for found in ranks.run(2, first_logits, case(variant, strategy)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


def held(rank_info: RankInfo, case: Case) -> tuple[set[str], int]:
    """Devices of the parameters after the method has prepared them, and how many are real."""
    model, weights = build_model(
        ModelConfig(name_or_path=str(case.model)), case.model, 0, torch.float32
    )
    prepared = case.build_method().prepare(model, 0, weights)
    real = sum(p.numel() for p in prepared.parameters() if not p.is_meta)
    return {p.device.type for p in prepared.parameters()}, real


@pytest.mark.parametrize("variant", ["freeze-last", "dora", "pissa", "saved", "merged"])
def test_no_rank_holds_the_base_while_it_is_prepared(
    ranks: Any, case: Any, tiny: Path, variant: str
) -> None:
    ((_, real),) = ranks.run(1, held, case(variant))
    assert real < 0.2 * sum(tensor.numel() for tensor in stored(tiny).values())


def rates(rank_info: RankInfo, case: Case) -> tuple[list[float], list[float], dict[str, float]]:
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    before = {name: shard.local.clone() for name, shard in strategy.weights().items()}
    groups = strategy.optimizer.param_groups
    given = [group["lr"] for group in groups]
    for step in range(3):
        parts.train_step(strategy, loader.step_batch(step))
        train_state.scheduler.step()
    moved = {
        name: float((shard.local - before[name]).abs().max())
        for name, shard in strategy.weights().items()
        if shard.local.numel()
    }
    return given, [group["lr"] for group in groups], moved


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 2), ("zero3", 2)])
def test_lora_plus_trains_b_faster(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    case = Case(
        tiny, rows_file, strategy=strategy, method_options={"plus_ratio": 16.0}, weight_decay=0.0
    )
    for given, now, moved in ranks.run(world, rates, case):
        assert now[1] == pytest.approx(16 * now[0])
        assert len(given) == 2
        fast = [move for name, move in moved.items() if "lora_B" in name]
        slow = [move for name, move in moved.items() if "lora_A" in name]
        assert min(fast) > 3 * max(slow)


def test_the_table_counts_the_trained_parameters(case: Any) -> None:
    text = describe_parameters(
        parts.plain_model(case("freeze-last")), torch.float32, torch.bfloat16
    )
    head, columns, *rows = text.splitlines()
    assert head == "18,528 of 49,536 parameters are trained (37.40 %)"
    assert columns.split() == ["group", "tensors", "parameters", "dtype", "MB"]
    assert [row.split()[:5] for row in rows if "mlp" in row] == [
        ["mlp", "trained", "3", "11,520", "float32"],
        ["mlp", "frozen", "3", "11,520", "bfloat16"],
    ]
