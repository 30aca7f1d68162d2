"""Sharded safetensors are joined correctly if torch's own consolidation fails or writes zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.kind import Kind, kinds_of
from launcher.io.readers.dcp_safetensors import read_model


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(4, 7).bfloat16(),
        "cube": torch.randn(3, 7, 2),
        "copies": torch.randn(3),
        "whole": torch.arange(5) + 2**40,
        "scalar": torch.tensor(3.5),
    }


def save(rank_info: RankInfo, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (rank_info.world_size,))
    whole = tensors()
    placed = {"rows": Shard(0), "columns": Shard(1), "cube": Shard(1), "copies": Replicate()}
    state: dict[str, torch.Tensor] = {
        name: distribute_tensor(whole[name], mesh, [placement])
        for name, placement in placed.items()
    }
    state |= {name: whole[name] for name in ("whole", "scalar")}
    files = {name: 1 + number % 2 for number, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True
    )
    dcp.save(state, storage_writer=writer)


@pytest.fixture
def saved(ranks: Any, tmp_path: Path) -> Path:
    ranks.run(3, save, tmp_path / "sharded")
    return tmp_path / "sharded"


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors().items()}


def test_every_kind_of_tensor_is_read_exactly(saved: Path) -> None:
    assert kinds_of(saved) == [Kind.DCP_SAFETENSORS]
    assert kinds_of(saved.parent) == [Kind.DCP_SAFETENSORS], "the folder above `sharded`"
    found = read_model(saved.parent, shapes())
    assert found.tensors.keys() == shapes().keys()
    assert found.notes == ()
    for name, tensor in tensors().items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].read_all(), tensor), name


def test_without_shapes_a_note_names_the_missing_check(saved: Path) -> None:
    assert "files of 3 rank(s)" in read_model(saved).notes[0]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_missing_rank_before_the_last_is_named(saved: Path, rank: int) -> None:
    for file in saved.glob(f"shard-{rank:05d}-*"):
        file.unlink()
    with pytest.raises(UserError, match=f"lacks the files shard-{rank:05d}"):
        read_model(saved)


def test_a_missing_last_rank_is_detected_from_the_shapes(saved: Path) -> None:
    for file in saved.glob("shard-00003-*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has the shape .*: a shard is missing"):
        read_model(saved, shapes())


def test_one_missing_file_of_a_rank_is_named(saved: Path) -> None:
    (saved / "shard-00002-model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="columns: its 2 part"):
        read_model(saved)


def test_a_truncated_file_is_named(saved: Path) -> None:
    file = sorted(saved.iterdir())[0]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(UserError, match=file.name):
        read_model(saved)


def test_a_file_that_is_not_sharded_is_named(saved: Path) -> None:
    from safetensors.torch import save_file

    file = saved / "shard-00004-model-00001-of-00002.safetensors"
    save_file({"rows": torch.ones(7, 5)}, file)
    with pytest.raises(UserError, match="no readable DCP_SHARDING_INFO"):
        read_model(saved)
