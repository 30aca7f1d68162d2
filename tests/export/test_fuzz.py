"""Damaged files of every format give the same result or a sentence: never a traceback, and neither
much time nor memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import LlamaForCausalLM

from launcher.folders import manifest
from launcher.folders.checkpoint import MANIFEST
from launcher.model.tiny import make_tiny
from tests.helpers.exports import make_adapter
from tests.helpers.sharded import Trained, save_zero, to_universal

COUNT = 600


@pytest.fixture(scope="module")
def seeds(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind, of models that are as small as possible."""
    root = tmp_path_factory.mktemp("seeds")
    make_tiny(root / "base", tie=False, seed=1)
    model = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    state = model.state_dict()
    shutil.copytree(root / "base", root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="200KB")
    for name, legacy in (("bin", False), ("legacy", True)):
        model.config.save_pretrained(root / name)
        torch.save(
            state, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
        )
    _save_dcp(root, model)
    make_adapter(root / "base", root / "adapter", r=2)
    shutil.copytree(root / "adapter", root / "adapter_bin")
    _as_pickle(root / "adapter_bin" / "adapter_model.safetensors")
    for stage in (2, 3):
        folder = root.parent / f"zero{stage}"
        ranks.run(2, save_zero, folder / "zero", Trained(stage, base=root / "base"))
        shutil.copytree(folder / "zero", root / f"zero{stage}")
        if stage == 2:
            to_universal(folder)
            shutil.copytree(folder / "universal", root / "universal")
    for name in ("zero2", "zero3", "universal"):
        shutil.copy(root / "base" / "config.json", root / name)
    return root


def _save_dcp(root: Path, model: Any) -> None:
    """A folder of torch's DCP in each form, and a checkpoint of Shardway with one."""
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save({"model": state}, checkpoint_id=root / "dcp")
        torch_dcp.save({"model": state}, checkpoint_id=root / "checkpoint" / "model")
        files = {name: 1 + number % 2 for number, name in enumerate(state)}
        writer = HuggingFaceStorageWriter(
            str(root / "dcp_safetensors"), fqn_to_index_mapping=files, save_distributed=True
        )
        torch_dcp.save(state, storage_writer=writer)
    for name in ("dcp", "dcp_safetensors"):
        model.config.save_pretrained(root / name)
    said = {
        "step": 1, "content": "all", "partial": False, "eval_loss": 1.5, "end_tokens": [2],
        "base": {"name_or_path": str(root / "base"), "revision": None},
    }  # fmt: skip
    (root / "checkpoint" / "trainer.json").write_text(json.dumps({"step": 1}))
    manifest.write(root / "checkpoint" / MANIFEST, said)


def _as_pickle(file: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.slow
def test_damaged_files_give_the_same_result_or_a_sentence(seeds: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.fuzz", str(seeds), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["count"] == COUNT
    assert not result["wrong"], "\n\n".join(result["wrong"])
