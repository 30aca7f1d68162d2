"""A quantized base is multiplied as its dequantized weights, and never changed.

test_matrix.py trains nf4 and int8 under every strategy; these are the settings that it omits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.checkpoint import SCHEME, Checkpoint
from launcher.model.quantized_linear import QuantizedLinear
from launcher.strategy import Strategy
from tests.helpers import parts
from tests.helpers.checkpoints import QUESTION, answer, save_and_answer
from tests.helpers.exports import consolidate, make_adapter
from tests.helpers.parts import Case, Options
from tests.helpers.quantized import FORMATS, round_trip

STEPS = 4


def case(
    tiny: Path,
    rows_file: Path,
    form: str,
    strategy: str = "single",
    more: Options | None = None,
    **options: Any,
) -> Case:
    return Case(
        tiny, rows_file, method="qlora", strategy=strategy, steps=STEPS, global_batch_size=12,
        method_options={**FORMATS[form], **(more or {})}, **options,
    )  # fmt: skip


@functools.cache
def losses_beside_dequantized(cell: Case, form: str) -> list[float]:
    """LoRA in the plain loop on weights that were quantized and immediately dequantized."""
    lora = Case(cell.model, cell.data, steps=STEPS, global_batch_size=12)
    model = AutoModelForCausalLM.from_pretrained(cell.model, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = round_trip(module.weight.data, form)
    model = lora.build_method().prepare(model, parts.SEED).train()
    return parts.plain_losses(lora, model)


def learn(rank_info: RankInfo, cell: Case) -> tuple[list[float], dict[str, Any]]:
    train_state, losses = parts.train(rank_info, cell)
    return losses, bytes_held(train_state.strategy)


def bytes_held(strategy: Strategy) -> dict[str, Any]:
    """The number of packed weights that this rank holds between steps, their total number, and
    their dtypes."""
    layers = [m for m in strategy.model.modules() if isinstance(m, QuantizedLinear)]
    held = whole = 0
    dtypes = set()
    for layer in layers:
        parameter = layer.weight
        mine = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else local_part(parameter)
        held += mine.nbytes
        numel = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        whole += numel * mine.itemsize
        dtypes.add(mine.dtype)
    return {"held": held, "whole": whole, "dtypes": dtypes, "layers": len(layers)}


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_sharded_base_trains_like_the_dequantized_base(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str
) -> None:
    cell = case(tiny, rows_file, "fp4-plain", strategy)
    expected = losses_beside_dequantized(case(tiny, rows_file, "fp4-plain"), "fp4-plain")
    for losses, found in ranks.run(2, learn, cell):
        assert losses == pytest.approx(expected, rel=2e-5)
        assert losses[-1] < losses[0]
        assert found["layers"] == 14
        assert found["dtypes"] == {torch.uint8}
        assert found["held"] <= found["whole"] / 2 + 14 * 96, "it is sharded by bytes"


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 2), ("zero3", 2), ("ddp", 2)])
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_bytes_in_the_working_dtype_are_not_changed(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int, precision: str
) -> None:
    storage = {"quant_storage": "bfloat16"}
    cell = case(tiny, rows_file, "nf4", strategy, storage, precision=precision)
    expected = losses_beside_dequantized(case(tiny, rows_file, "nf4"), "nf4")
    for losses, found in ranks.run(world, learn, cell):
        assert losses == pytest.approx(expected, rel=2e-2)
        assert found["dtypes"] == {torch.bfloat16}


def evaluations(rank_info: RankInfo, cell: Case, between: bool) -> list[list[float]]:
    """The packed bytes and logits after training; `between`: evaluate before and in the middle."""
    train_state, loader = parts.set_up(rank_info, cell)
    strategy = train_state.strategy

    def logits() -> list[float]:
        found: list[float] = answer(strategy).flatten().tolist()
        strategy.model.train()
        return found

    strategy.model.train()
    if between:
        assert logits() == logits()
    for step in range(2):
        parts.train_step(strategy, loader.step_batch(step))
        if between:
            logits()
    return [logits(), logits()]


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
def test_evaluation_does_not_change_any_weight(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    """bitsandbytes' own layer repacks weights in evaluation on CPUs with AVX512-BF16."""
    cell = case(tiny, rows_file, "nf4", strategy, precision="bf16", scheduler="constant")
    never = ranks.run(world, evaluations, cell, False)
    often = ranks.run(world, evaluations, cell, True)
    assert never == often
    assert never[0][0] == never[0][1]


@pytest.mark.parametrize("form", FORMATS)
def test_the_export_can_give_the_logits_of_the_trained_model(
    ranks: Any, tmp_path: Path, tiny: Path, rows_file: Path, form: str
) -> None:
    more = {
        "modules_to_save": ["down_proj", "embed_tokens"],
        "target_modules": ["q_proj", "up_proj"],
    }
    cell = case(tiny, rows_file, form, "fsdp", more)
    expected, _ = ranks.run(2, save_and_answer, cell, tmp_path)
    checkpoint = Checkpoint(tmp_path / f"checkpoints/step-{STEPS:06d}")
    assert manifest.check(checkpoint.manifest)[SCHEME]["quant_method"] == "bitsandbytes"
    answers = {}
    for base in ("original", "dequantized"):
        answers[base] = exported(checkpoint, tmp_path, base)
    torch.testing.assert_close(answers["dequantized"], expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(answers["original"], expected, rtol=0.2, atol=0.1)
    assert not torch.equal(answers["original"], answers["dequantized"])


def exported(checkpoint: Checkpoint, folder: Path, base: str) -> torch.Tensor:
    to = folder / base
    consolidate(checkpoint.path, "--qlora-base", base, "--output", to, "--dtype", "fp32")
    model = AutoModelForCausalLM.from_pretrained(to, dtype="auto").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=QUESTION).logits
    return logits


def test_an_adapter_merged_first_is_quantized_with_the_base(
    ranks: Any, tmp_path: Path, tiny: Path, rows_file: Path
) -> None:
    """The sum is exported onto the original base; the base used in training is unknown."""
    more = {"merge_first": [str(make_adapter(tiny, tmp_path / "one", r=3))]}
    cell = case(tiny, rows_file, "nf4", "fsdp", more)
    expected, _ = ranks.run(2, save_and_answer, cell, tmp_path)
    checkpoint = Checkpoint(tmp_path / f"checkpoints/step-{STEPS:06d}")
    torch.testing.assert_close(
        exported(checkpoint, tmp_path, "original"), expected, rtol=0.2, atol=0.1
    )
    with pytest.raises(UserError, match="other adapters were merged before the base was quantized"):
        exported(checkpoint, tmp_path, "dequantized")


def adapted(rank_info: RankInfo, cell: Case) -> set[str]:
    strategy = parts.set_up(rank_info, cell)[0].strategy
    return {
        f"{type(layer).__mro__[1].__module__}: {type(layer.get_base_layer()).__name__}"
        for layer in strategy.model.modules()
        if isinstance(layer, LoraLayer)
    }


def test_adapters_are_peft_layers_around_quantized_linear(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    assert ranks.run(1, adapted, case(tiny, rows_file, "nf4")) == [
        {"peft.tuners.lora.layer: QuantizedLinear"}
    ]
