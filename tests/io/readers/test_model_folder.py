"""Plain model folders in all forms are read; an index that contradicts the files is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.io.readers.model_folder import read_model
from tests.helpers.sharded import tiny_llama

A, B = torch.randn(4, 6).bfloat16(), torch.arange(5)
Shards = dict[str, dict[str, torch.Tensor]]


def write(folder: Path, shards: Shards, weight_map: dict[str, str] | None = None) -> Path:
    """Safetensors shards and their index."""
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name)
    listed = {key: name for name, tensors in shards.items() for key in tensors}
    index = {"weight_map": listed if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read_model(folder).tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].name, found[name].dtype) == (name, tensor.dtype)
        assert torch.equal(found[name].read_all(), tensor), name


@pytest.mark.parametrize("size", ["50GB", "50KB"])
def test_saves_of_transformers_are_read_exactly(tmp_path: Path, size: str) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "50KB")
    assert_same(tmp_path, model.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_read_with_tied_weights_once(tmp_path: Path, legacy: bool) -> None:
    model = tiny_llama(tied=True)
    state = {**model.state_dict(), "transposed": torch.randn(4, 6).t()}
    new = not legacy
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    torch.save({}, tmp_path / "training_args.bin")
    found = read_model(tmp_path)
    assert found.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_same(tmp_path, {k: v for k, v in state.items() if k not in found.aliases})


def test_torch_shards_are_read_exactly(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": B}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {k: f"pytorch_model-0000{n}-of-00002.bin" for n, k in ((1, "a"), (2, "b"))}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(tmp_path, {"a": A, "b": B})


def test_a_nested_state_dict_is_found_and_its_names_are_cleaned(tmp_path: Path) -> None:
    names = [
        "module.a",
        "_forward_module._fsdp_wrapped_module.l._checkpoint_wrapped_module.b",
        "l._extra_state",
    ]
    state: dict[str, Any] = dict(zip(names, (A, B, A.clone()), strict=True))
    torch.save({"state_dict": {**state, "note": "x"}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, {"a": A, "l.b": B})
    assert "note" in read_model(tmp_path).notes[0]


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"module.a": A, "_orig_mod.a": B}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"module\.a and _orig_mod\.a"):
        read_model(tmp_path)


def test_shards_in_subfolders_with_unusual_names_are_read(tmp_path: Path) -> None:
    write(tmp_path, {"x/model.safetensors-00001-of-00002.safetensors": {"a": A}, "y": {"b": B}})
    assert_same(tmp_path, {"a": A, "b": B})


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "blob")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert_same(tmp_path / "snapshot", {"a": A})


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, r"three\.safetensors is missing"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "lists c .*which does not contain it"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "lists a .*which does not contain it"),
        ({"a": "one.safetensors"}, None),
        ({"a": "../one.safetensors"}, "outside the folder"),
        ({"a": "/one.safetensors"}, "outside the folder"),
        ({}, "lists no tensors"),
    ],
)
def test_an_index_that_disagrees_is_named(
    tmp_path: Path, weight_map: dict[str, str], message: str | None
) -> None:
    shards = {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}}
    folder = write(tmp_path, shards, weight_map)
    if message is None:  # a file that is not listed does not belong to the model
        assert_same(folder, {"a": A})
        return
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"one": {"a": A, "b": B}, "two": {"b": B + 1}})
    with pytest.raises(UserError, match="b is in both one and two"):
        read_model(folder)


def test_a_tensor_that_is_not_listed_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"one": {"a": A, "b": B}}, {"a": "one"})
    with pytest.raises(UserError, match=r"contains b .*does not list"):
        read_model(folder)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("x.bin", "y.bin"):
        torch.save({"a": A}, tmp_path / name)
    with pytest.raises(UserError, match=r"2 \.bin files"):
        read_model(tmp_path)


def test_a_folder_with_only_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"contains adapter_model\.safetensors and no adapter_c"):
        read_model(tmp_path)
