"""What the driver says about the GPUs of this machine, and what a preflight measures on one."""

from __future__ import annotations

import pytest
import torch

from launcher.cluster.gpu_health import inspect_gpus
from launcher.machines import measure

GIB = 1 << 30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_driver_of_this_machine_is_asked() -> None:
    found = inspect_gpus()
    assert len(found) == torch.cuda.device_count()
    assert all(gpu.memory > GIB and gpu.driver and gpu.temperature is not None for gpu in found)
    assert found[0].name == torch.cuda.get_device_name(0)


def test_a_product_has_the_same_bits_each_time() -> None:
    device = torch.device("cuda", 0)
    (first, seconds), (second, _) = measure.time_product(device), measure.time_product(device)
    assert first == second
    assert 0 < seconds < 1
