"""Universal checkpoints are read exactly, or refused if the conversion mixed up weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.folders.kind import Kind, kinds_of
from launcher.io.readers import universal, zero
from tests.helpers.sharded import Trained, save_zero, to_universal

Converted = tuple[Path, dict[str, torch.Tensor]]
Convert = Callable[[Trained], Converted]


@pytest.fixture(scope="module")
def convert(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Kind → (folder, live weights); each is trained and converted by DeepSpeed itself once."""
    done: dict[Trained, Converted] = {}

    def get(kind: Trained) -> Converted:
        if kind not in done:
            folder = tmp_path_factory.mktemp("converted")
            live = ranks.run(3, save_zero, folder / "zero", kind)[0]
            to_universal(folder)
            done[kind] = folder / "universal", live
        return done[kind]

    return get


@pytest.mark.parametrize(
    "kind", [Trained(2), Trained(2, tied=True), Trained(3), Trained(3, lora=True)], ids=str
)
def test_the_live_weights_are_read_bit_for_bit(convert: Convert, kind: Trained) -> None:
    folder, live = convert(kind)
    assert kinds_of(folder) == [Kind.UNIVERSAL]
    found = universal.read_model(folder)
    assert found.tensors.keys() == live.keys()
    for name, weight in live.items():
        assert found.tensors[name].dtype == weight.dtype
        assert torch.equal(found.tensors[name].read_all(), weight), name
    masters = universal.read_model(folder, masters=True)
    exact = zero.read_model(folder.with_name("zero"), masters=True)
    assert masters.aliases == exact.aliases
    for name, tensor in exact.tensors.items():
        assert torch.equal(masters.tensors[name].read_all(), tensor.read_all()), name


def test_weights_mixed_up_by_round_robin_are_refused(convert: Convert) -> None:
    folder, _ = convert(Trained(2, round_robin=True))
    with pytest.raises(UserError, match="round_robin_gradients"):
        universal.read_model(folder)


def test_tensors_that_were_left_out_are_noted(convert: Convert) -> None:
    kind = Trained(3, lora=True, exclude_frozen=True)
    folder, live = convert(kind)
    found = universal.read_model(folder)
    assert "exclude_frozen_parameters" in found.notes[0]
    assert found.tensors.keys() < live.keys()


def test_a_missing_weight_is_named(convert: Convert, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(convert(Trained(3))[0], tmp_path / "copy"))
    shutil.rmtree(folder / "zero" / "lm_head.weight")
    with pytest.raises(UserError, match=r"lm_head\.weight/fp32\.pt cannot be read"):
        universal.read_model(folder)
