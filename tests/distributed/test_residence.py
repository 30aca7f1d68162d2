"""Where state is between steps and within one: sharded, offloaded, gathered, freed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from launcher.strategy.base import share_cores
from launcher.training.loss import token_loss
from tests.helpers import parts
from tests.helpers.layouts import OFFLOADED, Layout
from tests.helpers.parts import Case
from tests.helpers.pool import message_of_error
from tests.helpers.sizes import held_bytes, zero_elements

ONE_RANK: Layout = ("fsdp_offload", 1, {})


def case_of(tiny: Path, rows_file: Path, layout: Layout, **options: Any) -> Case:
    strategy, _, strategy_options = layout
    return Case(
        tiny, rows_file, strategy=strategy, strategy_options=strategy_options,
        global_batch_size=12, **options,
    )  # fmt: skip


def groups_of(model: Any) -> list[Any]:
    """FSDP2's groups of parameters, the root's last."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = [module._get_fsdp_state() for module in (*modules[1:], modules[0])]
    return [group for state in states for group in state._fsdp_param_groups]


def policies(rank_info: RankInfo, case: Case) -> tuple[set[Any], int, int]:
    """The arguments of `fully_shard`, how many parameters it offloads, how many there are."""
    strategy = parts.set_up(rank_info, case)[0].strategy
    groups = groups_of(strategy.model)
    offloaded = sum(each.offload_to_cpu for group in groups for each in group.fsdp_params)
    told = {type(group.offload_policy) for group in groups}
    return told, offloaded, len(list(strategy.model.parameters()))


@pytest.mark.parametrize("layout", [*OFFLOADED[:2], ONE_RANK], ids=lambda layout: layout[0])
def test_fully_shard_offloads_frozen_parameters_too(
    ranks: Any, tiny: Path, rows_file: Path, layout: Layout
) -> None:
    case = case_of(tiny, rows_file, layout, method="lora")
    for told, offloaded, all_of_them in ranks.run(layout[1], policies, case):
        assert told == {CPUOffloadPolicy}
        assert offloaded == all_of_them


def shards_and_storages(rank_info: RankInfo, case: Case) -> list[tuple[int, int]]:
    """Bytes of this rank's part of each parameter, and of its storage."""
    strategy = parts.set_up(rank_info, case)[0].strategy
    local = [local_part(p.detach()) for p in strategy.model.parameters()]
    return [(each.nbytes, each.untyped_storage().nbytes()) for each in local]


@pytest.mark.parametrize("layout", [("fsdp", 2, {}), OFFLOADED[0]], ids=lambda layout: layout[0])
def test_shards_are_not_views_of_the_model_file(
    ranks: Any, tiny: Path, rows_file: Path, layout: Layout
) -> None:
    """In the dtype of the file, so that nothing is cast."""
    case = case_of(tiny, rows_file, layout, method="full", precision="pure_bf16")
    for found in ranks.run(layout[1], shards_and_storages, case):
        assert found
        assert all(storage == shard for shard, storage in found)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fsdp_shards_offloaded_state(ranks: Any, tiny: Path, rows_file: Path, method: str) -> None:
    """As without offload: each rank holds its share; all ranks hold one copy."""
    case = case_of(tiny, rows_file, OFFLOADED[0], method=method)
    held = ranks.run(3, held_bytes, case, 3)
    (alone,) = ranks.run(1, held_bytes, case)
    for what in ("parameters", "moments"):
        assert sum(rank[what] for rank in held) == alone[what]
        assert max(rank[what] for rank in held) == held[0][f"promised {what}"] < alone[what]


def engine(rank_info: RankInfo, case: Case) -> dict[str, Any]:
    """DeepSpeed's settings, the optimizer it made from them and what it compiled for it."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    strategy: Any = parts.set_up(rank_info, case)[0].strategy
    zero3 = strategy.config.stage == 3
    return {
        "optimizer": strategy.model.zero_cpu_offload(),
        "parameters": strategy._zero.offload_param if zero3 else None,
        "buffers": all(flat.grad.numel() == flat.numel() for flat in strategy._flat_masters),
        "steps": type(strategy._zero.optimizer),
        "compiled": {name for name in OpBuilder._loaded_ops if "adam" in name},
        "says": strategy.describe(),
    }


def test_deepspeed_offloads_to_torch_adamw(ranks: Any, tiny: Path, rows_file: Path) -> None:
    for layout in OFFLOADED[2:]:
        for found in ranks.run(layout[1], engine, case_of(tiny, rows_file, layout)):
            assert found["optimizer"]
            assert found["buffers"], "gradients have a place of their own on the CPU"
            assert found["parameters"] is (True if layout[0] == "zero3_offload" else None)
            assert found["steps"] is torch.optim.AdamW
            assert not found["compiled"]
            assert "masters and moments on cpu" in found["says"]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("layout", OFFLOADED[2:], ids=lambda layout: layout[0])
def test_zero_shards_offloaded_state(
    ranks: Any, tiny: Path, rows_file: Path, method: str, layout: Layout
) -> None:
    case = case_of(tiny, rows_file, layout, method=method)
    model = parts.plain_model(case)
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = ranks.run(layout[1], zero_elements, case)
    assert sum(rank["masters"] for rank in held) == trained
    assert sum(rank["moments"] for rank in held) == 2 * trained
    if layout[0] == "zero3_offload":
        padding = layout[1] * len(list(model.parameters()))
        assert every <= sum(rank["partitions"] for rank in held) <= every + padding
        assert {rank["whole"] for rank in held} == {0}


def test_buffers_for_the_disk_hold_the_largest_part(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings = {"offload_param": "nvme", "nvme_path": str(tmp_path), "nvme_buffer_size": 6000}
    case = case_of(tiny, rows_file, ("zero3", 2, settings))
    said = r"nvme_buffer_size=6000 is less than a rank's part of .*embed_tokens.weight; .*=6216"
    for message in ranks.run(2, message_of_error, engine, case):
        assert re.search(said, message)


def gathered(rank_info: RankInfo, case: Case) -> tuple[int, int, int, list[float]]:
    """Bytes of the gathered layers between forward and backward, and after backward; bytes of all
    layers; the losses of some steps."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    strategy.model.train()
    layers = [each for group in groups_of(strategy.model)[:-1] for each in group.fsdp_params]
    whole = sum(each.sharded_param.numel() * each.sharded_param.itemsize for each in layers)

    def held() -> int:
        outputs = [output for each in layers for output in each.all_gather_outputs]
        return sum(output.untyped_storage().size() for output in outputs)

    (batch, *_) = loader.step_batch(0).micro_batches
    strategy.set_last_micro_batch(last=True)
    loss = token_loss(strategy.model, batch)
    between = held()
    strategy.backward(loss / 100)
    after = held()
    strategy.step(1.0)
    losses = [float(parts.train_step(strategy, loader.step_batch(n)).loss) for n in range(1, 5)]
    return between, after, whole, losses


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("layout", [("fsdp", 2, {}), OFFLOADED[1], ONE_RANK], ids=lambda e: e[0])
def test_gathered_layers_are_freed_after_forward_or_kept(
    ranks: Any, tiny: Path, rows_file: Path, layout: Layout, method: str
) -> None:
    strategy, world, options = layout
    found = {}
    for frees in (True, False):
        chosen = {**options, "reshard_after_forward": frees}
        layout = (strategy, world, chosen)
        case = case_of(tiny, rows_file, layout, method=method, scheduler="constant")
        found[frees] = ranks.run(world, gathered, case)
    for freed, kept in zip(found[True], found[False], strict=True):
        assert freed[0] == 0
        assert kept[0] >= kept[2], "whole layers, with padding"
        assert freed[1] == kept[1] == 0, "backward frees them in any case"
        assert freed[3] == kept[3], "the same bits"


def test_a_rank_on_a_gpu_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.strategy.base.usable_cpus", lambda: 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        share_cores(RankInfo(0, 0, 4, 4, torch.device("cpu")))
        assert torch.get_num_threads() == 1
        share_cores(RankInfo(0, 0, 4, 4, torch.device("cuda")))
        assert torch.get_num_threads() == 3
        share_cores(RankInfo(0, 0, 2, 2, torch.device("cuda")))
        assert torch.get_num_threads() == 3, "OMP_NUM_THREADS has said it"
    finally:
        torch.set_num_threads(before)
