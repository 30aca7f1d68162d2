"""The kind of a folder follows from its file names; several kinds have a fixed order."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.folders.kind import SHARDED, Kind, is_run, kinds_of

STATES = "mp_rank_00_model_states.pt"
STATES_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
SHARD = "shard-00001-model-00001-of-00002.safetensors"
# name → the files in it (a name that ends in / is a folder), and its kinds
FOLDERS: dict[str, tuple[list[str], list[Kind]]] = {
    "run": (["config.yaml", "checkpoints/", "logs/", "export/config.json"], [Kind.RUN]),
    "run that has not begun": (["config.yaml"], []),
    "checkpoint of an adapter": (
        ["manifest.json", "config.yaml", "trainer.json", "adapter/adapter_config.json"],
        [Kind.CHECKPOINT],
    ),
    "checkpoint of a model": (["manifest.json", "model/.metadata"], [Kind.CHECKPOINT]),
    "checkpoint without a manifest": (["config.yaml", "model/.metadata"], []),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], [Kind.ADAPTER]),
    "adapter in a pickle": (["adapter_config.json", "adapter_model.bin"], [Kind.ADAPTER]),
    "adapter with the configuration of its base": (
        ["adapter_config.json", "adapter_model.safetensors", "config.json"],
        [Kind.ADAPTER, Kind.MODEL],
    ),
    "model": (["config.json", "model.safetensors", "tokenizer.json"], [Kind.MODEL]),
    "model in shards": (["config.json", "model.safetensors.index.json"], [Kind.MODEL]),
    "model in pickles": (["config.json", "pytorch_model.bin"], [Kind.MODEL]),
    "model without weights": (["config.json"], [Kind.MODEL]),
    "weights without a configuration": (["model.safetensors"], [Kind.STATE_DICT]),
    "weights in a pickle": (["pytorch_model_fsdp.bin", "optimizer.bin"], [Kind.STATE_DICT]),
    "state of a PEFT model": (["pytorch_model.bin", "adapter_config.json"], [Kind.STATE_DICT]),
    "state of a PEFT model, in a model folder": (
        ["pytorch_model.bin", "adapter_config.json", "config.json"],
        [Kind.MODEL],
    ),
    "files of a trainer": (["optimizer.bin", "scheduler.bin", "training_args.bin"], []),
    "export": (
        ["config.json", "model.safetensors.index.json", "consolidation_manifest.json"],
        [Kind.MODEL],
    ),
    "ZeRO": (["latest", f"global_step2/{STATES}"], [Kind.ZERO]),
    "ZeRO of stage 2, one step": ([STATES], [Kind.ZERO]),
    "ZeRO of stage 3, one step": ([STATES_3], [Kind.ZERO]),
    "steps of ZeRO without a pointer": ([f"global_step2/{STATES}"], []),
    "universal": (["zero/w/fp32.pt", STATES], [Kind.UNIVERSAL]),
    "universal, by its pointer": (["latest_universal", f"universal/{STATES}"], [Kind.UNIVERSAL]),
    "ZeRO that was converted": (["latest", "latest_universal"], [Kind.ZERO]),
    "DCP": ([".metadata", "__0_0.distcp"], [Kind.DCP]),
    "DCP that did not finish": (["__0_0.distcp"], [Kind.DCP]),
    "DCP safetensors": ([SHARD], [Kind.DCP_SAFETENSORS]),
    "DCP safetensors, from above": ([f"sharded/{SHARD}"], [Kind.DCP_SAFETENSORS]),
    "DCP safetensors with DCP's metadata": ([SHARD, ".metadata"], [Kind.DCP_SAFETENSORS, Kind.DCP]),
    "accelerate's folder, from above": (["pytorch_model_fsdp_0/.metadata"], [Kind.DCP]),
    "accelerate's file a rank": (["pytorch_model_fsdp_0_rank1.bin"], [Kind.DCP]),
    "verl's file a rank": (["model_world_size_2_rank_0.pt"], [Kind.DCP]),
    "metadata of single ranks": (["__0.metadata"], [Kind.DCP]),
    "something else": (["README.md", "optimizer_0/.metadata"], []),
    "empty": ([], []),
}
# What trainers save next to their sharded state: complete weights of the same step come first.
TRAINERS: dict[str, tuple[list[str], list[Kind]]] = {
    "configuration": (["config.json", "latest"], [Kind.ZERO, Kind.MODEL]),
    "whole weights": (["config.json", "model.safetensors", "latest"], [Kind.MODEL, Kind.ZERO]),
    "whole weights in shards": (
        ["config.json", "model.safetensors.index.json", "pytorch_model_fsdp_0/.metadata"],
        [Kind.MODEL, Kind.DCP],
    ),
    "adapter": (
        ["config.json", "adapter_config.json", "adapter_model.safetensors", "latest"],
        [Kind.ADAPTER, Kind.MODEL, Kind.ZERO],
    ),
    "settings of an adapter": (["adapter_config.json", "latest"], [Kind.ZERO, Kind.ADAPTER]),
    "adapter of an unknown base": (
        ["adapter_config.json", "adapter_model.safetensors", "pytorch_model_fsdp_0/.metadata"],
        [Kind.ADAPTER, Kind.DCP],
    ),
    "adapter of ZeRO": (
        ["adapter_config.json", "adapter_model.bin", "latest"],
        [Kind.ADAPTER, Kind.ZERO],
    ),
}


def make(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_the_kind_of_a_folder_follows_from_its_file_names(tmp_path: Path, name: str) -> None:
    names, kinds = FOLDERS[name]
    folder = make(tmp_path / "folder", names)
    assert kinds_of(folder) == kinds
    assert is_run(folder) == (kinds == [Kind.RUN])


@pytest.mark.parametrize("beside", TRAINERS)
def test_complete_weights_come_before_sharded_state(tmp_path: Path, beside: str) -> None:
    names, kinds = TRAINERS[beside]
    assert kinds_of(make(tmp_path / "checkpoint-2", names)) == kinds


def test_a_run_and_a_checkpoint_come_before_other_kinds(tmp_path: Path) -> None:
    names = ["config.yaml", "checkpoints/", "manifest.json", "config.json"]
    kinds = [Kind.RUN, Kind.CHECKPOINT, Kind.ADAPTER, Kind.MODEL]
    assert kinds_of(make(tmp_path / "folder", [*names, "adapter_config.json"])) == kinds


def test_every_kind_has_an_example() -> None:
    assert {kind for _, kinds in FOLDERS.values() for kind in kinds} == set(Kind)
    assert {*SHARDED} == set(Kind) - {Kind.RUN, Kind.CHECKPOINT, Kind.ADAPTER, Kind.MODEL}


def test_a_kind_has_a_text_description() -> None:
    assert f"{Kind.ZERO}" == "DeepSpeed ZeRO checkpoint"


def test_a_path_that_is_not_a_folder_has_no_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert kinds_of(tmp_path / "config.json") == []
    assert kinds_of(tmp_path / "gone") == []
