"""DCP shards of a run become a model; shards of another model are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from launcher.distributed.gather import gather_to_main
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from tests.helpers import parts
from tests.helpers.checkpoints import save_and_answer
from tests.helpers.exports import consolidate, plan_of, stored
from tests.helpers.parts import Case
from tests.helpers.stored_models import publish
from tests.helpers.tiny_models import release


def test_a_full_run_becomes_a_model_in_the_dtype_of_the_base(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = Case(tiny, rows_file, method="full", steps=3)
    ranks.run(3, save_and_answer, case, tmp_path)
    (plain,) = ranks.run(
        1, trained_weights, Case(tiny, rows_file, method="full", strategy="single", steps=3)
    )
    consolidate(tmp_path / "checkpoints" / "step-000003", "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == stored(tiny).keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), plain[name], rtol=1e-2, atol=1e-4)


def trained_weights(rank_info: RankInfo, case: Case) -> dict[str, torch.Tensor]:
    train_state, _ = parts.train(rank_info, case)
    strategy = train_state.strategy
    trained = gather_to_main(strategy.weights())
    assert trained is not None
    return trained


def test_without_a_base_the_class_keeps_its_own_weights_in_fp32(tmp_path: Path) -> None:
    """As from_pretrained does for the dtype that config.json states."""
    folder = publish("deepseek_v3", tmp_path / "model", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    shutil.copy(folder / "config.json", tmp_path / "dcp")
    consolidate(tmp_path / "dcp", "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert wide == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert {tensor.dtype for name, tensor in found.items() if name not in wide} == {torch.bfloat16}
    assert torch.equal(found[min(wide)], model.state_dict()[min(wide)])


def test_another_model_s_shards_are_refused(tmp_path: Path, tiny: Path) -> None:
    dcp.save({"model": {"a": torch.ones(2)}}, checkpoint_id=tmp_path)
    with pytest.raises(UserError, match=r"lacks model\.embed_tokens\.weight and 20 more"):
        plan_of(tmp_path, base=str(tiny))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lm_head.weight", (300, 48)), ("lm_head.weight", (259, 40)), ("model.norm.weight", (5,))],
)
def test_a_tensor_of_another_shape_is_refused(
    tmp_path: Path, tiny_untied: Path, name: str, shape: tuple[int, ...]
) -> None:
    """The head may differ from the base in its number of rows, but not from the embedding."""
    tensors = stored(tiny_untied)
    expected = f"{name} has shape {list(shape)}, but in the base model {list(tensors[name].shape)}"
    dcp.save({"model": tensors | {name: torch.ones(shape)}}, checkpoint_id=tmp_path)
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        plan_of(tmp_path, base=str(tiny_untied))


def trained_folder(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of the model of `base` with all its parameters changed, by the names that
    training gives them; what `from_pretrained` of its export should have."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=folder)
    return dict(model.state_dict())


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta", "cohere"])
def test_a_tied_parameter_has_the_name_of_the_base(model_type: str, tmp_path: Path) -> None:
    """CamembertForCausalLM registers its head before its embedding, and stores the embedding."""
    base, out = tmp_path / "base", tmp_path / "out"
    release(model_type, base)
    expected = trained_folder(base, tmp_path / "step")
    consolidate(tmp_path / "step", "--base", base, "--output", out)
    assert stored(out).keys() == stored(base).keys()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.config.pad_token_id == 0
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_trained_row_of_the_padding_token_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YoutuForCausalLM clears the row of its `pad_token_id` in each `from_pretrained`."""
    base, out = tmp_path / "base", tmp_path / "out"
    release("youtu", base)
    expected = trained_folder(base, tmp_path / "step")
    assert expected["lm_head.weight"][0].all()
    consolidate(tmp_path / "step", "--base", base, "--output", out)
    assert "pad_token_id=0 is now null" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, expected["lm_head.weight"])
