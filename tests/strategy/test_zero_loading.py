"""What DeepSpeed's engine gets: a model on the device of the rank. See also tests/fake_cuda."""

from __future__ import annotations

import torch
from torch import nn

from launcher.distributed.process_group import RankInfo
from launcher.strategy.zero_loading import load_weights

ELSEWHERE = torch.device("meta")  # a device other than the CPU that every machine has


class Rotary(nn.Module):
    """Buffers as transformers registers them: two names of a tensor, and one that is saved."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = torch.ones(4)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies, persistent=False)
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("absent", None)
        self.weight = nn.Parameter(torch.ones(2))


def test_every_buffer_is_moved_and_keeps_its_names_and_dtype() -> None:
    model = nn.ModuleDict({"one": Rotary(), "two": Rotary()})
    rank_info = RankInfo(0, 0, 1, 1, ELSEWHERE)
    load_weights(model, {}, rank_info, torch.bfloat16, zero3=None)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    assert sorted(buffers) == [
        f"{module}.{name}"
        for module in ("one", "two")
        for name in ("bias", "inv_freq", "original_inv_freq")
    ]
    assert {(each.device, each.dtype) for each in buffers.values()} == {(ELSEWHERE, torch.float32)}
    assert model["one"].inv_freq is model["one"].original_inv_freq
    assert model["one"].absent is None
    assert list(model.state_dict()) == ["one.weight", "one.bias", "two.weight", "two.bias"]
    assert {each.device for each in model.parameters()} == {ELSEWHERE}
