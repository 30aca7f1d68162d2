"""The random number generators of a rank: torch's on CPU and GPU, Python's and numpy's."""

from __future__ import annotations

import random

import numpy as np
import torch
from safetensors.torch import load

States = dict[str, torch.Tensor]  # generator → its state


def capture(device: torch.device) -> States:
    """The states of all generators; of the GPU's if `device` is one."""
    numpy_state = np.random.get_state(legacy=False)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor(numpy_state["state"]["pos"]),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: States, device: torch.device) -> None:
    """Set all generators to the states that `capture` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {
        "key": states["numpy"].numpy().astype(np.uint32),
        "pos": int(states["numpy_position"]),
    }
    np.random.set_state(numpy_state)
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def join(states: list[bytes]) -> States:
    """The states of every rank, each a safetensors file in memory, as "RANK/generator"."""
    return {
        f"{rank}/{name}": state
        for rank, each in enumerate(states)
        for name, state in load(each).items()
    }


def of_rank(states: States, rank: int) -> States:
    """The states of a rank from what `join` returned."""
    prefix = f"{rank}/"
    return {n.removeprefix(prefix): s for n, s in states.items() if n.startswith(prefix)}
