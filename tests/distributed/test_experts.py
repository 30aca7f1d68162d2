"""Fused experts are split along a dim that the ranks divide: memory, losses, checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.distributed.gather import gather_to_main
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from launcher.model.load import build_model
from launcher.strategy import fsdp_units
from launcher.training.build import new_strategy
from tests.helpers import checkpoints, exports, parts
from tests.helpers.checkpoints import END, STOP, run_steps, six_steps
from tests.helpers.experts import make_experts
from tests.helpers.parts import Case
from tests.helpers.pool import message_of_error

LAYOUTS = [  # experts, ranks, strategy, its options
    (8, 3, "fsdp", {}),
    (3, 2, "fsdp", {}),
    (2, 4, "fsdp", {}),
    (3, 4, "hsdp", {"shard_size": 2}),
]
Layout = tuple[int, int, str, dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {experts: make_experts(folder / str(experts), experts) for experts in (2, 3, 8)}


def held(rank_info: RankInfo, case: Case) -> dict[str, tuple[int, int]]:
    """Name of a parameter → elements that this rank holds after a step, and those of its storage;
    the same of its moments."""
    train_state, loader = parts.set_up(rank_info, case)
    parts.train_step(train_state.strategy, loader.step_batch(0))
    local = {name: local_part(p.detach()) for name, p in train_state.model.named_parameters()}
    moments = train_state.strategy.state().moments["exp_avg"]
    local |= {f"moment of {name}": shard.local for name, shard in moments.items()}
    return {
        name: (part.numel(), part.untyped_storage().nbytes() // part.itemsize)
        for name, part in local.items()
    }


@pytest.mark.parametrize(("experts", "world", "strategy", "options"), LAYOUTS)
def test_each_rank_holds_its_share_of_the_experts(
    ranks: Any, models: dict[int, Path], rows_file: Path, experts: int, world: int, strategy: str,
    options: dict[str, Any],
) -> None:  # fmt: skip
    case = Case(
        models[experts], rows_file, method="full", strategy=strategy, strategy_options=options,
        global_batch_size=12,
    )  # fmt: skip
    shards = options.get("shard_size", world)
    whole = {name: p.numel() for name, p in parts.plain_model(case).named_parameters()}
    stacks = {name: numel for name, numel in whole.items() if ".experts." in name}
    assert len(stacks) == 4
    for found in ranks.run(world, held, case):
        for name, numel in stacks.items():
            assert found[name] == (numel / shards, numel / shards), "without padding"
            assert found[f"moment of {name}"] == (numel / shards, numel / shards)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("experts", "world", "strategy", "options"), LAYOUTS)
def test_losses_equal_a_plain_loop(
    ranks: Any, models: dict[int, Path], rows_file: Path, experts: int, world: int, strategy: str,
    options: dict[str, Any], method: str,
) -> None:  # fmt: skip
    plain = Case(models[experts], rows_file, method=method, steps=8, global_batch_size=12)
    case = dataclasses.replace(plain, strategy=strategy, strategy_options=options)
    expected = parts.expected_losses(plain)
    for found in ranks.run(world, parts.losses, case):
        assert found == pytest.approx(expected, rel=1e-5)


def loaded(rank_info: RankInfo, case: Case) -> tuple[int, Any]:
    """Bytes of the files that this rank has read, and the weights as rank 0 gathers them."""
    config = case.config()
    model, weights = build_model(config.model, case.model, 0, torch.float32)
    assert weights is not None
    strategy = new_strategy(config, rank_info)
    strategy.setup(model, weights, lambda trained: torch.optim.SGD([p for _, p, _ in trained]))
    full = gather_to_main(strategy.weights())
    return weights.folder.bytes_read, full and {name: t.numpy() for name, t in full.items()}


def test_each_rank_reads_its_part_of_fused_experts(
    ranks: Any, rows_file: Path, tmp_path: Path
) -> None:
    settings = {"head_dim": 12, "intermediate_size_mlp": 24}
    model = make_experts(tmp_path, 3, "llama4_text", **settings)
    case = Case(model, rows_file, method="full")
    found = ranks.run(4, loaded, case)
    (stored,) = (load_file(file) for file in tmp_path.glob("*.safetensors"))
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    assert sum(each[0] for each in found) == nbytes, "once altogether"
    assert max(each[0] for each in found) < 0.26 * nbytes
    weights = found[0][1]
    assert weights.keys() == stored.keys()
    assert all((weights[name] == tensor.numpy()).all() for name, tensor in stored.items())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_run_resumes_bit_for_bit(
    ranks: Any, models: dict[int, Path], rows_file: Path, tmp_path: Path, optimizer: str
) -> None:
    case = six_steps(models[3], rows_file, "full", "fsdp", optimizer=optimizer)
    whole = ranks.run(4, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(4, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(4, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def full_state(rank_info: RankInfo, case: Case, folder: Path, step: int, rows: bool) -> Any:
    """All weights and moments of the checkpoint of `step`, as rank 0 gathers them after restoring
    it; the run is created by one step if `step` is 0. `rows`: experts are split by rows."""
    with pytest.MonkeyPatch.context() as patch:
        if rows:
            patch.setattr(fsdp_units, "split_dim", lambda shape, num_shards: 0)
        if step == 0:
            train_state, _ = checkpoints.train_from(rank_info, case, folder, 0, 1)
        else:
            train_state, _ = parts.set_up(rank_info, case)
            checkpoints.restore(train_state, folder, step)
    state = train_state.strategy.state()
    parts_of_it = {"weight": state.weights, **state.moments}
    full = gather_to_main(
        {
            f"{kind}/{name}": each
            for kind, part in parts_of_it.items()
            for name, each in part.items()
        }
    )
    return None if full is None else {name: tensor.numpy() for name, tensor in full.items()}


@pytest.mark.parametrize("rows", [False, True], ids=["dims", "rows"])
def test_other_layouts_restore_the_same_state(
    ranks: Any, models: dict[int, Path], rows_file: Path, tmp_path: Path, rows: bool
) -> None:
    """Also a checkpoint of a version that split all tensors by rows."""
    case = six_steps(models[2], rows_file, "full", "fsdp")
    saved = ranks.run(4, full_state, case, tmp_path, 0, rows)[0]
    assert len(saved) == 3 * len(list(parts.plain_model(case).parameters()))
    for strategy, world in (("fsdp", 4), ("fsdp", 2), ("zero3", 2), ("fsdp", 3)):
        other = dataclasses.replace(case, strategy=strategy)
        found = ranks.run(world, full_state, other, tmp_path, 1, False)[0]
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            assert (found[name] == tensor).all(), (strategy, world, name)


def test_8_bit_moments_of_another_split_are_refused(
    ranks: Any, models: dict[int, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Their blocks are of other elements."""
    case = six_steps(models[2], rows_file, "full", "fsdp", optimizer="adamw_8bit")
    ranks.run(4, full_state, case, tmp_path, 0, True)
    for message in ranks.run(4, message_of_error, full_state, case, tmp_path, 1, False):
        assert "absmax1.model.layers.0.mlp.experts" in message
        assert "expected [4, " in message


def test_the_export_has_the_trained_weights(
    ranks: Any, models: dict[int, Path], rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(models[3], rows_file, "full", "fsdp")
    logits = ranks.run(2, checkpoints.save_and_answer, case, tmp_path)[0]
    checkpoint = tmp_path / f"checkpoints/step-{END:06d}"
    exports.consolidate(checkpoint, "--output", tmp_path / "export", "--dtype", "fp32")
    case = dataclasses.replace(case, model=tmp_path / "export")
    model = parts.plain_model(case).eval()
    torch.testing.assert_close(model(input_ids=checkpoints.QUESTION).logits, logits)


def test_an_adapter_with_trained_experts_is_gathered(
    ranks: Any, models: dict[int, Path], rows_file: Path, tmp_path: Path
) -> None:
    options = {"modules_to_save": ["experts"], "target_modules": ["q_proj"]}
    case = Case(
        models[3], rows_file, method="lora", method_options=options, global_batch_size=12, steps=2
    )
    logits = ranks.run(4, checkpoints.save_and_answer, case, tmp_path)[0]
    adapter = tmp_path / "checkpoints/step-000002/adapter"
    stacks = [n for n in load_file(adapter / "adapter_model.safetensors") if "experts" in n]
    assert len(stacks) == 4
    again = dataclasses.replace(case, method_options={"adapter": str(adapter)})
    model = parts.plain_model(again).eval()
    torch.testing.assert_close(model(input_ids=checkpoints.QUESTION).logits, logits)
