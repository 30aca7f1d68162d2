"""DCP folders are read exactly, and their pickles execute nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from launcher.distributed.process_group import Place
from launcher.errors import UserError
from launcher.export.dcp import read_model
from launcher.export.plan import make_plan
from launcher.export.source import Source
from launcher.export.write import write
from tests.distributed.test_saving import save_and_answer
from tests.export.test_consolidate import stored
from tests.helpers import parts
from tests.helpers.parts import Case

TENSORS = {
    "a": torch.randn(7, 5),
    "scalar": torch.tensor(3.5),
    "whole": torch.arange(9),
    "half": torch.randn(4, 3).bfloat16(),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save({"model": TENSORS, "optimizer": {"a": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def test_tensors_come_back_with_shape_and_dtype(saved: Path) -> None:
    tensors = read_model(saved)
    assert tensors.keys() == TENSORS.keys(), "the optimizer's are left alone"
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name].whole(), tensor)
        assert tensors[name].dtype == tensor.dtype


def test_a_missing_shard_is_named(saved: Path) -> None:
    next(saved.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"\.distcp is missing"):
        read_model(saved)


def test_a_save_that_did_not_finish_is_named(saved: Path) -> None:
    (saved / ".metadata").unlink()
    with pytest.raises(UserError, match="no DCP metadata"):
        read_model(saved)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_harmful_pickle_is_refused_and_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="system"):
        read_model(saved)
    assert not (tmp_path / "harmed").exists()


def test_a_full_run_becomes_a_model_in_the_base_s_dtype(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = Case(tiny, rows_file, method="full", steps=3)
    ranks.run(3, save_and_answer, case, tmp_path)
    (plain,) = ranks.run(
        1, trained_weights, Case(tiny, rows_file, method="full", strategy="single", steps=3)
    )
    shards = tmp_path / "checkpoints" / "step-000003" / "model"
    write(make_plan(Source(tiny, shards=shards), 10**9), tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == stored(tiny).keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), plain[name], rtol=1e-2, atol=1e-4)


def trained_weights(place: Place, case: Case) -> dict[str, torch.Tensor]:
    strategy, _, _ = parts.train(place, case)
    trained = strategy.gather(strategy.weights())
    assert trained is not None
    return trained


def test_another_model_s_shards_are_refused(saved: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match="differ in"):
        make_plan(Source(tiny, shards=saved), 10**9)
