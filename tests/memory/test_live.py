"""What is alive is counted, once, while it lives; fake tensors take no memory."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from launcher.errors import UserError
from launcher.memory.absent import as_fakes
from launcher.memory.live import Fakes, Live

KB = 1024


def test_a_storage_is_counted_while_it_lives() -> None:
    live = Live()
    with live.counting():
        one = torch.empty(KB, dtype=torch.uint8)
        two = torch.empty(2 * KB, dtype=torch.uint8)
        assert live.now == 3 * KB
        del one
        assert (live.now, live.peak) == (2 * KB, 3 * KB)
        del two
    assert (live.now, live.peak) == (0, 3 * KB)


def test_views_share_their_storage() -> None:
    live = Live()
    with live.counting():
        whole = torch.empty(KB, dtype=torch.uint8)
        part = whole[:10].view(2, 5)
        assert live.now == KB
        del whole
        assert live.now == KB
        del part
    assert live.now == 0


def test_a_storage_that_is_emptied_counts_nothing() -> None:
    live = Live()
    with live.counting():
        tensor = torch.empty(KB, dtype=torch.uint8)
        tensor.untyped_storage().resize_(0)
        assert live.now == 0
        tensor.untyped_storage().resize_(KB)
        assert live.now == KB
    again = torch.empty(KB, dtype=torch.uint8)
    again.untyped_storage().resize_(0)
    assert live.now == KB  # outside nothing is counted


def test_the_phase_of_the_peak_is_kept() -> None:
    live = Live()
    with live.counting():
        live.phase = "forward"
        kept = torch.empty(2 * KB, dtype=torch.uint8)
        live.phase = "backward"
        del kept
        torch.empty(KB, dtype=torch.uint8)
    assert (live.peak, live.peak_phase) == (2 * KB, "forward")


def test_what_backward_needs_is_alive_until_then() -> None:
    live, x = Live(), torch.ones(KB, requires_grad=True)
    with live.counting():
        loss = x.exp().sum()  # exp keeps its result
        assert live.now == 4 * KB + 4
        loss.backward()
        del loss
        assert live.now == 4 * KB  # the gradient


def test_fakes_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    live = Live()
    with Fakes(), live.counting():
        huge = torch.zeros(10**12, dtype=torch.uint8)
        assert live.now == 10**12
        assert (huge + 1).shape == huge.shape
    assert live.peak == 2 * 10**12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_the_host_is_told_that_all_is_well() -> None:
    with Fakes():
        norm = torch.zeros(3).norm()
        assert bool(norm.isfinite()) is True
        assert norm.item() == 1


def test_sizes_that_depend_on_values_are_refused() -> None:
    with Fakes(), pytest.raises(UserError, match=r"cannot be planned.*nonzero"):
        torch.zeros(3).nonzero()


def test_tied_parameters_stay_tied_and_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with Fakes():
        as_fakes(model)
        assert model[1].weight is model[0].weight
        assert model[0].weight.is_meta
        assert model[0].bias is not model[1].bias
        model.to_empty(device="cpu")
        assert model(torch.ones(2, 4)).shape == (2, 4)


def test_grouped_products_have_their_shape_in_fp32_too() -> None:
    with Fakes():
        left, right = torch.zeros(16, 32), torch.zeros(2, 32, 64)
        ends = torch.tensor([8, 16], dtype=torch.int32)
        product = torch.ops.aten._grouped_mm(left, right, offs=ends)
        assert (product.shape, product.dtype) == ((16, 64), torch.float32)
