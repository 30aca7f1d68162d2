"""DeepSpeed checkpoints are read bit for bit as trained; incomplete ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from launcher.errors import UserError
from launcher.folders.kind import Kind, kinds_of
from launcher.io.readers import zero
from tests.helpers.sharded import Trained, save_zero

Saved = tuple[Path, dict[str, torch.Tensor]]
SaveZero = Callable[[Trained], Saved]

FULL = [
    *(
        Trained(stage, round_robin=robin, alignment=aligned)
        for stage in (1, 2)
        for robin in (False, True)
        for aligned in (False, True)
    ),
    Trained(3),
]
LORA = [Trained(stage, lora=True) for stage in (1, 2, 3)]


BF16_OPTIMIZER = Trained(1, extra='{"data_types": {"grad_accum_dtype": "fp32"}}')
NARROW = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
BF16_MASTERS = [Trained(stage, extra=json.dumps({"bf16": NARROW})) for stage in (2, 3)]


@pytest.fixture(scope="module")
def save(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> SaveZero:
    """Kind → (folder, live weights); each is trained once, on three ranks."""
    done: dict[Trained, Saved] = {}

    def get(kind: Trained) -> Saved:
        if kind not in done:
            folder = tmp_path_factory.mktemp("zero")
            done[kind] = folder, ranks.run(3, save_zero, folder, kind)[0]
        return done[kind]

    return get


@pytest.fixture
def copy(save: SaveZero, tmp_path: Path) -> Callable[[Trained], Path]:
    """A copy of a checkpoint, to be damaged."""
    return lambda kind: Path(shutil.copytree(save(kind)[0], tmp_path / f"zero{kind.stage}"))


def assert_same(found: Any, live: dict[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == live.keys()
    for name, weight in live.items():
        tensor = found.tensors[name]
        assert tensor.name == name
        assert tensor.dtype == weight.dtype, name
        assert torch.equal(tensor.read_all(), weight), name


def load(file: Path) -> dict[str, Any]:
    classes = [ZeroStageEnum, LossScaler, fragment_address]
    with torch.serialization.safe_globals(classes):
        return torch.load(file, weights_only=True)


def edit(file: Path, **changes: Any) -> None:
    torch.save({**load(file), **changes}, file)


@pytest.mark.parametrize("kind", [*FULL, *LORA, BF16_OPTIMIZER, *BF16_MASTERS], ids=str)
def test_the_live_weights_are_read_bit_for_bit(save: SaveZero, kind: Trained) -> None:
    folder, live = save(kind)
    assert kinds_of(folder) == [Kind.ZERO]
    assert_same(zero.read_model(folder), live)


@pytest.mark.parametrize("kind", [*FULL, *LORA, BF16_OPTIMIZER], ids=str)
def test_master_weights_round_to_the_live_weights(save: SaveZero, kind: Trained) -> None:
    folder, live = save(kind)
    found = zero.read_model(folder, masters=True).tensors
    assert found.keys() == live.keys()
    for name, weight in live.items():
        assert torch.equal(found[name].read_all().to(weight.dtype), weight), name
        trained = weight.is_floating_point() and ("lora_" in name or not kind.lora)
        if trained and not name.endswith("norm.scale"):
            assert found[name].dtype == torch.float32, name
    assert any(not torch.equal(found[name].read_all(), live[name].float()) for name in live)


@pytest.mark.parametrize("kind", BF16_MASTERS, ids=str)
def test_master_weights_keep_their_dtype(save: SaveZero, kind: Trained) -> None:
    folder, live = save(kind)
    assert_same(zero.read_model(folder, masters=True), live)


def test_rows_read_by_the_slow_implementation_are_equal(save: SaveZero) -> None:
    folder, live = save(Trained(3))
    found = zero.read_model(folder).tensors["lm_head.weight"]
    exact = found.reference(330, 340)  # where a rank's part ends within a row
    assert exact.dtype == torch.float64
    assert torch.equal(exact.bfloat16(), live["lm_head.weight"][330:340])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tied_weights_are_read_once(save: SaveZero, stage: int) -> None:
    folder, live = save(Trained(stage, tied=True))
    found = zero.read_model(folder)
    assert found.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_same(found, live)


@pytest.mark.parametrize("stage", [2, 3])
def test_tensors_that_were_left_out_are_noted(save: SaveZero, stage: int) -> None:
    folder, live = save(Trained(stage, lora=True, exclude_frozen=True))
    found = zero.read_model(folder)
    assert "exclude_frozen_parameters" in found.notes[0]
    trained = {name for name in live if "lora_" in name or name.endswith((".seen", ".scale"))}
    assert found.tensors.keys() == trained


def test_full_precision_is_kept(save: SaveZero) -> None:
    folder, live = save(Trained(3, precision="fp32"))
    assert_same(zero.read_model(folder), live)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_tag_is_found_by_name_or_by_its_own_path(save: SaveZero, stage: int) -> None:
    folder, live = save(Trained(stage))
    assert_same(zero.read_model(folder, tag="global_step2"), live)
    assert_same(zero.read_model(folder / "global_step2"), live)


def test_the_working_weights_of_stage_1_need_no_optimizer(copy: Callable[[Trained], Path]) -> None:
    folder = copy(Trained(1))
    for file in folder.glob("*/*_optim_states.pt"):
        file.unlink()
    assert zero.read_model(folder).tensors
    with pytest.raises(UserError, match="no master weights"):
        zero.read_model(folder, masters=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_rank_is_named(copy: Callable[[Trained], Path], stage: int) -> None:
    folder = copy(Trained(stage))
    next(folder.glob("*/*zero_pp_rank_1_*_optim_states.pt")).unlink()
    with pytest.raises(UserError, match="lacks the optim_states file of rank 1"):
        zero.read_model(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_of_an_older_save_is_named(copy: Callable[[Trained], Path], stage: int) -> None:
    folder = copy(Trained(stage))
    first = next(folder.glob("*/*zero_pp_rank_0_*_optim_states.pt"))
    shutil.copy(first, first.with_name(first.name.replace("pp_rank_0", "pp_rank_3")))
    with pytest.raises(UserError, match="older save"):
        zero.read_model(folder)


def test_a_rank_s_file_of_another_step_is_named(copy: Callable[[Trained], Path]) -> None:
    folder = copy(Trained(3))
    edit(next(folder.glob("*/zero_pp_rank_1_*_model_states.pt")), global_steps=1)
    with pytest.raises(UserError, match="ranks 0 and 1 differ in global_steps"):
        zero.read_model(folder)


@pytest.mark.parametrize("pattern", ["*_optim_states.pt", "*_model_states.pt"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_truncated_file_is_named(
    copy: Callable[[Trained], Path], stage: int, pattern: str
) -> None:
    file = sorted(copy(Trained(stage)).glob(f"*/{pattern}"))[0]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(UserError, match=file.name):
        zero.read_model(file.parent.parent)


def test_a_latest_file_with_a_missing_tag_is_named(copy: Callable[[Trained], Path]) -> None:
    folder = copy(Trained(1))
    (folder / "latest").write_text("global_step99")
    with pytest.raises(UserError, match=r"global_step99 is not a folder.*global_step2"):
        zero.read_model(folder)


def test_offloaded_groups_are_named(copy: Callable[[Trained], Path]) -> None:
    folder = copy(Trained(3))
    for file in folder.glob("*/*_optim_states.pt"):  # as the engine writes them under NVMe offload
        state = load(file)["optimizer_state_dict"]
        empty = [torch.empty(0) for _ in state["fp32_flat_groups"]]
        edit(file, optimizer_state_dict={**state, "fp32_flat_groups": empty})
    with pytest.raises(UserError, match="offloaded to NVMe"):
        zero.read_model(folder)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_states.pt", "pipeline parallelism"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "expert parallelism"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "expert parallelism"),
    ],
)
def test_models_split_across_ranks_are_refused(
    copy: Callable[[Trained], Path], name: str, what: str
) -> None:
    folder = copy(Trained(1))
    state = folder / "global_step2" / "mp_rank_00_model_states.pt"
    shutil.copy(state, state.with_name(name))
    with pytest.raises(UserError, match=f"{name} is of {what}"):
        zero.read_model(folder)


def test_degrees_of_parallelism_are_refused(copy: Callable[[Trained], Path]) -> None:
    file = copy(Trained(1)) / "global_step2" / "mp_rank_00_model_states.pt"
    edit(file, mp_world_size=2)
    with pytest.raises(UserError, match="tensor parallelism"):
        zero.read_model(file.parent)
