"""The operations that are counted, and the roofline of GPU and network, by arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config.rules.rule import World
from launcher.memory.estimate import Amounts
from launcher.memory.roofline import step_time
from launcher.memory.work import flops_of
from tests.memory.test_search import H100, RANKS, config


def test_operations_are_those_of_matrix_products_and_causal_attention() -> None:
    aten = torch.ops.aten
    left, right = torch.empty(3, 5), torch.empty(5, 7)
    assert flops_of(aten.mm.default, (left, right)) == 2 * 3 * 5 * 7
    assert flops_of(aten.addmm.default, (torch.empty(7), left, right)) == 2 * 3 * 5 * 7
    assert flops_of(aten.add.Tensor, (left, left)) == 0
    heads = torch.empty(2, 4, 16, 8)  # rows, heads, length, size
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    assert flops_of(attention.default, (heads,) * 3) == 4 * 2 * 4 * (16 * 16 / 2) * 8
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert flops_of(backward.default, (heads,) * 4) == 10 * 2 * 4 * (16 * 16 / 2) * 8


AMOUNTS: Amounts = {
    "flops": 1e15, "written": 1e11, "kernels": 5e3, "trained": 8e9, "elements": 8e9,
    "working": 16e9, "optimizer": 64e9,
}  # fmt: skip


def test_the_slower_of_gpu_and_network_counts(tmp_path: Path) -> None:
    def seconds(name: str, nodes: int = 1, **amounts: float) -> Any:
        asked = config(tmp_path, method={"name": "full"}, strategy={"name": name})
        return step_time(asked, World(nodes, RANKS), AMOUNTS | amounts, H100)

    one = seconds("fsdp")
    assert one.compute == pytest.approx(8 * (1e15 / 643.11e12 + 2e11 / 2.68e12))
    assert one.network == pytest.approx(8 * (2 * 16e9 + 32e9) * 0.75 / 315e9)
    assert one.total == one.compute + one.optimizer
    assert seconds("fsdp", flops=1e12, written=1e9).total == pytest.approx(
        one.network + one.optimizer
    )
    assert seconds("fsdp", kernels=1e6).compute == pytest.approx(8 * 10)
    many = seconds("fsdp", nodes=8)  # one micro-batch
    assert seconds("ddp").network < one.network < 8 * many.network
    few = {"trained": 1e8}  # of an adapter
    assert seconds("hsdp", nodes=8, **few).network < seconds("fsdp", nodes=8, **few).network
    assert seconds("fsdp_offload").total > one.total
    assert seconds("zero1").network < seconds("zero2").network < seconds("zero3").network
