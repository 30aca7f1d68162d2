"""DCP folders of any writer are read exactly, and their pickles execute nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.kind import Kind, kinds_of
from launcher.io.readers.dcp import read_model
from tests.helpers.sharded import tiny_llama

TENSORS = {
    "a": torch.randn(7, 5),
    "scalar": torch.tensor(3.5),
    "whole": torch.arange(9) + 2**40,
    "half": torch.randn(4, 3).bfloat16(),
    "cube": torch.randn(2, 3, 4),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save({"model": TENSORS, "optimizer": {"a": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read_model(folder).tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].name, found[name].dtype) == (name, tensor.dtype)
        assert torch.equal(found[name].read_all(), tensor), name


def test_tensors_are_read_with_shape_and_dtype(saved: Path) -> None:
    assert kinds_of(saved) == [Kind.DCP]
    assert_same(saved, TENSORS)


def test_a_flat_save_contains_only_the_model(tmp_path: Path) -> None:
    dcp.save(TENSORS, checkpoint_id=tmp_path)
    assert_same(tmp_path, TENSORS)


def test_a_model_is_distinguished_from_a_nested_optimizer(tmp_path: Path) -> None:
    dcp.save({**TENSORS, "optim": {"state": {"a": torch.ones(2)}}}, checkpoint_id=tmp_path)
    assert_same(tmp_path, TENSORS)


def test_a_model_inside_an_application_state_is_found(tmp_path: Path) -> None:
    state = {"app": {"model": TENSORS, "optim": {"a": torch.ones(1)}}}
    dcp.save(state, checkpoint_id=tmp_path)
    assert_same(tmp_path, TENSORS)


def test_the_model_is_distinguished_from_its_average(tmp_path: Path) -> None:
    dcp.save({"model": TENSORS, "ema": {"model": {"a": torch.ones(1)}}}, checkpoint_id=tmp_path)
    assert_same(tmp_path, TENSORS)


def test_an_accelerate_folder_is_found_from_its_parent(tmp_path: Path) -> None:
    dcp.save({"model": TENSORS}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": {"a": torch.ones(1)}}, checkpoint_id=tmp_path / "optimizer_0")
    assert kinds_of(tmp_path) == [Kind.DCP]
    assert_same(tmp_path, TENSORS)
    with pytest.raises(UserError, match="contains no model, but optimizer"):
        read_model(tmp_path / "optimizer_0")


def save_by_accelerate(rank_info: RankInfo, folder: Path) -> dict[str, torch.Tensor]:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import save_fsdp_model

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    state = PartialState(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    model = tiny_llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (rank_info.world_size,)))
    save_fsdp_model(plugin, state, model, str(folder))
    PartialState._reset_state()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def test_saves_of_accelerate_are_read_exactly(ranks: Any, tmp_path: Path) -> None:
    whole = ranks.run(2, save_by_accelerate, tmp_path)[0]
    assert_same(tmp_path, whole)


def test_entries_that_are_not_weights_are_left_out_with_a_note(tmp_path: Path) -> None:
    extra = {"layer._extra_state": torch.ones(1), "step": 3}
    dcp.save({"model": {**TENSORS, **extra}}, checkpoint_id=tmp_path)
    assert_same(tmp_path, TENSORS)
    (note,) = read_model(tmp_path).notes
    assert "layer._extra_state" in note
    assert "step" in note


def test_prefixes_of_wrappers_are_removed(tmp_path: Path) -> None:
    wrapped = {"module.layers.0._orig_mod._checkpoint_wrapped_module.w": torch.ones(2)}
    dcp.save({"model": wrapped}, checkpoint_id=tmp_path / "one")
    assert_same(tmp_path / "one", {"layers.0.w": torch.ones(2)})
    dcp.save({"model": {"w": torch.ones(2), "module.w": torch.ones(2)}}, checkpoint_id=tmp_path)
    with pytest.raises(UserError, match=r"both w and module\.w|both module\.w and w"):
        read_model(tmp_path)


def save_fsdp(rank_info: RankInfo, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Shard a model as in training and save it; returns its complete weights."""
    model = tiny_llama()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"]))
    dims = (2, rank_info.world_size // 2) if kind == "hsdp" else (rank_info.world_size,)
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicate", "shard")[-len(dims) :])
    for layer in model.get_submodule(
        "base_model.model.model" if kind == "lora" else "model"
    ).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if kind == "optim":
        optimizer = torch.optim.AdamW(model.parameters())
        model(input_ids=torch.arange(4).view(1, -1)).logits.sum().backward()
        optimizer.step()
        state = {
            "model": get_model_state_dict(model),
            "optim": get_optimizer_state_dict(model, optimizer),
        }
    dcp.save(state, checkpoint_id=folder)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


@pytest.mark.parametrize(("kind", "world"), [("full", 3), ("lora", 2), ("hsdp", 4), ("optim", 3)])
def test_fsdp_shards_are_joined(ranks: Any, tmp_path: Path, kind: str, world: int) -> None:
    whole = ranks.run(world, save_fsdp, tmp_path, kind)[0]
    assert_same(tmp_path, whole)


def save_placements(rank_info: RankInfo, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (rank_info.world_size,))
    torch.manual_seed(0)
    state = {
        "columns": distribute_tensor(torch.randn(4, 7), mesh, [Shard(1)]),
        "middle": distribute_tensor(torch.randn(3, 7, 2), mesh, [Shard(1)]),
        "rows": distribute_tensor(torch.randn(2, 7), mesh, [Shard(0)]),
        "copies": distribute_tensor(torch.randn(3), mesh, [Replicate()]),
    }
    dcp.save({"model": state}, checkpoint_id=folder)


def test_shards_of_any_dim_are_joined(ranks: Any, tmp_path: Path) -> None:
    ranks.run(3, save_placements, tmp_path)
    torch.manual_seed(0)
    names = {"columns": (4, 7), "middle": (3, 7, 2), "rows": (2, 7), "copies": (3,)}
    assert_same(tmp_path, {name: torch.randn(shape) for name, shape in names.items()})


def test_a_missing_shard_is_named(saved: Path) -> None:
    next(saved.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"\.distcp is missing"):
        read_model(saved)


def test_a_truncated_shard_is_named(saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{file.name} ends before byte"):
        read_model(saved)


class Same(StreamTransformExtension):
    """Stands in for zstd, whose library may be missing."""

    @staticmethod
    def from_descriptor(version: str) -> Same:
        return Same()

    @staticmethod
    def registry_name() -> str:
        return "stream.same"

    def get_descriptor(self) -> str:
        return "stream.same/1"

    def transform_to(self, output: Any) -> Any:
        return output

    def transform_from(self, input: Any) -> Any:
        return input


def test_a_compressed_save_is_refused(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path, _extensions=[Same()])
    dcp.save({"model": TENSORS}, storage_writer=writer)
    with pytest.raises(UserError, match="without extensions"):
        read_model(tmp_path)


def test_a_save_that_did_not_finish_is_named(saved: Path) -> None:
    (saved / ".metadata").unlink()
    assert kinds_of(saved) == [Kind.DCP]
    with pytest.raises(UserError, match="did not finish"):
        read_model(saved)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("__0.metadata", "use_collectives=True"),
        ("pytorch_model_fsdp_0_rank1.bin", "accelerate"),
        ("pytorch_model_fsdp_rank1.bin", "accelerate"),
        ("model_world_size_2_rank_0.pt", "verl"),
    ],
)
def test_saves_that_cannot_be_read_are_refused_with_the_reason(
    tmp_path: Path, name: str, what: str
) -> None:
    (tmp_path / name).touch()
    assert kinds_of(tmp_path) == [Kind.DCP]
    with pytest.raises(UserError, match=what):
        read_model(tmp_path)


def test_flattened_parameters_are_refused(tmp_path: Path) -> None:
    dcp.save({"model": {"layers.0._flat_param": torch.ones(9)}}, checkpoint_id=tmp_path)
    with pytest.raises(UserError, match=r"layers\.0\._flat_param"):
        read_model(tmp_path)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_harmful_pickle_is_refused_and_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"posix\.system"):
        read_model(saved)
    assert not (tmp_path / "harmed").exists()


def test_a_missing_part_is_named(ranks: Any, tmp_path: Path) -> None:
    ranks.run(3, save_placements, tmp_path / "good")
    metadata = dcp.FileSystemReader(tmp_path / "good").read_metadata()
    lost = next(i for i in metadata.storage_data if i.fqn == "model.columns" and i.offset[1])
    del metadata.storage_data[lost]
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"columns: its 2 part\(s\) do not tile"):
        read_model(tmp_path / "bad")
