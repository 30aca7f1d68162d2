"""Each live storage is counted once; fake tensors take no memory."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from launcher.errors import UserError
from launcher.memory.fake_weights import make_parameters_fake
from launcher.memory.mem_tracker import FakeTensors, MemTracker

KB = 1024


def test_a_storage_is_counted_while_it_is_alive() -> None:
    tracker = MemTracker()
    with tracker.track():
        one = torch.empty(KB, dtype=torch.uint8)
        two = torch.empty(2 * KB, dtype=torch.uint8)
        assert tracker.current == 3 * KB
        del one
        assert (tracker.current, tracker.peak) == (2 * KB, 3 * KB)
        del two
    assert (tracker.current, tracker.peak) == (0, 3 * KB)


def test_views_share_their_storage() -> None:
    tracker = MemTracker()
    with tracker.track():
        whole = torch.empty(KB, dtype=torch.uint8)
        part = whole[:10].view(2, 5)
        assert tracker.current == KB
        del whole
        assert tracker.current == KB
        del part
    assert tracker.current == 0


def test_a_resized_storage_is_counted_as_empty() -> None:
    tracker = MemTracker()
    with tracker.track():
        tensor = torch.empty(KB, dtype=torch.uint8)
        tensor.untyped_storage().resize_(0)
        assert tracker.current == 0
        tensor.untyped_storage().resize_(KB)
        assert tracker.current == KB
    again = torch.empty(KB, dtype=torch.uint8)
    again.untyped_storage().resize_(0)
    assert tracker.current == KB  # outside the tracker, nothing is counted


def test_the_phase_of_the_peak_is_recorded() -> None:
    tracker = MemTracker()
    with tracker.track():
        tracker.phase = "forward"
        kept = torch.empty(2 * KB, dtype=torch.uint8)
        tracker.phase = "backward"
        del kept
        torch.empty(KB, dtype=torch.uint8)
    assert (tracker.peak, tracker.peak_phase) == (2 * KB, "forward")


def test_saved_tensors_are_alive_until_backward() -> None:
    tracker, x = MemTracker(), torch.ones(KB, requires_grad=True)
    with tracker.track():
        loss = x.exp().sum()  # exp keeps its result
        assert tracker.current == 4 * KB + 4
        loss.backward()
        del loss
        assert tracker.current == 4 * KB  # the gradient


def test_fake_tensors_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracker = MemTracker()
    with FakeTensors(), tracker.track():
        huge = torch.zeros(10**12, dtype=torch.uint8)
        assert tracker.current == 10**12
        assert (huge + 1).shape == huge.shape
    assert tracker.peak == 2 * 10**12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_fake_scalars_read_as_one_and_finite() -> None:
    with FakeTensors():
        norm = torch.zeros(3).norm()
        assert bool(norm.isfinite()) is True
        assert norm.item() == 1


def test_sizes_that_depend_on_values_are_refused() -> None:
    with FakeTensors(), pytest.raises(UserError, match=r"cannot be planned.*nonzero"):
        torch.zeros(3).nonzero()


def test_tied_parameters_stay_tied_and_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with FakeTensors():
        make_parameters_fake(model)
        assert model[1].weight is model[0].weight
        assert model[0].weight.is_meta
        assert model[0].bias is not model[1].bias
        model.to_empty(device="cpu")
        assert model(torch.ones(2, 4)).shape == (2, 4)


def test_grouped_matmul_has_its_shape_in_fp32_too() -> None:
    with FakeTensors():
        left, right = torch.zeros(16, 32), torch.zeros(2, 32, 64)
        ends = torch.tensor([8, 16], dtype=torch.int32)
        product = torch.ops.aten._grouped_mm(left, right, offs=ends)
        assert (product.shape, product.dtype) == ((16, 64), torch.float32)
