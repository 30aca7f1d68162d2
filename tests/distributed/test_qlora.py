"""A quantised base is multiplied as what it stands for, and never changed.

test_matrix.py trains nf4 and int8 under every strategy; here are the settings that it leaves alone.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bits
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from launcher import manifest
from launcher.checkpoint.layout import Checkpoint
from launcher.distributed.process_group import Place
from launcher.distributed.shards import local_part
from launcher.errors import UserError
from launcher.model.quantised import QuantisedLinear
from launcher.strategy import Strategy
from tests.helpers import parts
from tests.helpers.exports import consolidate, make_adapter
from tests.helpers.parts import Case

QUESTION = torch.arange(3, 60).view(1, -1)
STEPS = 4
FORMATS: dict[str, tuple[tuple[str, Any], ...]] = {
    "nf4": (),
    "fp4-plain": (("quant_type", "fp4"), ("double_quant", False)),
    "int8": (("bits", 8),),
}


def case(
    tiny: Path, rows_file: Path, form: str, strategy: str = "single", *more: Any, **options: Any
) -> Case:
    return Case(
        tiny, rows_file, method="qlora", strategy=strategy, steps=STEPS, global_batch_size=12,
        method_options=(*FORMATS[form], *more), **options,
    )  # fmt: skip


def round_trip(weight: torch.Tensor, form: str) -> torch.Tensor:
    """By bitsandbytes alone, in fp32, of the weight as it is stored."""
    options = dict(FORMATS[form])
    if "bits" in options:
        packed, absmax, _ = bits.int8_vectorwise_quant(weight.half())
        return bits.int8_vectorwise_dequant(packed, absmax).float()
    kind = options["quant_type"] if "quant_type" in options else "nf4"
    packed, state = bits.quantize_4bit(
        weight, quant_type=kind, compress_statistics="double_quant" not in options
    )
    state.shape, state.dtype = torch.Size([weight.numel() // 64, 64]), torch.float32
    return bits.dequantize_4bit(packed, state).view(weight.shape)


@functools.cache
def losses_beside_dequantised(cell: Case, form: str) -> list[float]:
    """LoRA by the plain loop beside weights that were quantised and dequantised at once."""
    lora = Case(cell.model, cell.data, steps=STEPS, global_batch_size=12)
    model = AutoModelForCausalLM.from_pretrained(cell.model, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = round_trip(module.weight.data, form)
    model = lora.build_method().prepare(model, parts.SEED).train()
    return parts.plain_losses(lora, model)


def learn(place: Place, cell: Case) -> tuple[list[float], dict[str, Any]]:
    strategy, _, losses = parts.train(place, cell)
    return losses, bytes_held(strategy)


def bytes_held(strategy: Strategy) -> dict[str, Any]:
    """Of the packed weights: how many this rank holds between steps, how many there are, and in
    which dtypes."""
    layers = [m for m in strategy.model.modules() if isinstance(m, QuantisedLinear)]
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
def test_a_sharded_base_trains_as_the_dequantised_one(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str
) -> None:
    cell = case(tiny, rows_file, "fp4-plain", strategy)
    expected = losses_beside_dequantised(case(tiny, rows_file, "fp4-plain"), "fp4-plain")
    for losses, found in ranks.run(2, learn, cell):
        assert losses == pytest.approx(expected, rel=2e-5)
        assert losses[-1] < losses[0]
        assert found["layers"] == 14
        assert found["dtypes"] == {torch.uint8}
        assert found["held"] <= found["whole"] / 2 + 14 * 96, "it is sharded by bytes"


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 2), ("zero3", 2), ("ddp", 2)])
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_bytes_in_the_working_dtype_are_left_alone(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int, precision: str
) -> None:
    cell = case(
        tiny, rows_file, "nf4", strategy, ("quant_storage", "bfloat16"), precision=precision
    )
    expected = losses_beside_dequantised(case(tiny, rows_file, "nf4"), "nf4")
    for losses, found in ranks.run(world, learn, cell):
        assert losses == pytest.approx(expected, rel=2e-2)
        assert found["dtypes"] == {torch.bfloat16}


def evaluations(place: Place, cell: Case, between: bool) -> list[list[float]]:
    """The packed bytes and logits after training; `between`: evaluated before and in the middle."""
    strategy, _, loader = parts.set_up(place, cell)

    def logits() -> list[float]:
        strategy.model.eval()
        with torch.no_grad():
            answer = strategy.model(input_ids=QUESTION).logits.flatten().tolist()
        strategy.model.train()
        return answer

    strategy.model.train()
    if between:
        assert logits() == logits()
    for step in range(2):
        parts.train_step(strategy, loader.window(step))
        if between:
            logits()
    return [logits(), logits()]


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
def test_evaluation_changes_no_weight(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    """bitsandbytes' own layer repacks weights in evaluation on CPUs with AVX512-BF16."""
    cell = case(tiny, rows_file, "nf4", strategy, precision="bf16")
    never = ranks.run(world, evaluations, cell, False)
    often = ranks.run(world, evaluations, cell, True)
    assert never == often
    assert never[0][0] == never[0][1]


def save(place: Place, cell: Case, folder: Path) -> torch.Tensor:
    """Logits after training, of which a checkpoint is saved."""
    torch.manual_seed(7 + place.rank)
    strategy, method, loader = parts.set_up(place, cell)
    learner = parts.learner(place, cell, strategy, method)
    strategy.model.train()
    for step in range(STEPS):
        parts.train_step(strategy, loader.window(step))
        learner.scheduler.step()
    parts.saver(learner, folder).save(STEPS, 0, None)
    strategy.model.eval()
    with torch.no_grad():
        answer: torch.Tensor = strategy.model(input_ids=QUESTION).logits
    return answer


@pytest.mark.parametrize("form", FORMATS)
def test_the_export_can_answer_as_what_was_trained(
    ranks: Any, tmp_path: Path, tiny: Path, rows_file: Path, form: str
) -> None:
    more = (("modules_to_save", Strings(["down_proj", "embed_tokens"])),)
    more += (("target_modules", Strings(["q_proj", "up_proj"])),)
    expected, _ = ranks.run(2, save, case(tiny, rows_file, form, "fsdp", *more), tmp_path)
    checkpoint = Checkpoint(tmp_path / f"checkpoints/step-{STEPS:06d}")
    assert manifest.check(checkpoint.manifest)["quantisation"]["quant_method"] == "bitsandbytes"
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
        answer: torch.Tensor = model(input_ids=QUESTION).logits
    return answer


def test_what_was_merged_first_is_quantised_with_the_base(
    ranks: Any, tmp_path: Path, tiny: Path, rows_file: Path
) -> None:
    """The sum is exported onto the original base; the base that training saw is not known."""
    more = (("merge_first", Strings([str(make_adapter(tiny, tmp_path / "one", r=3))])),)
    expected, _ = ranks.run(2, save, case(tiny, rows_file, "nf4", "fsdp", *more), tmp_path)
    checkpoint = Checkpoint(tmp_path / f"checkpoints/step-{STEPS:06d}")
    torch.testing.assert_close(
        exported(checkpoint, tmp_path, "original"), expected, rtol=0.2, atol=0.1
    )
    with pytest.raises(UserError, match="other adapters were merged before the base was quantised"):
        exported(checkpoint, tmp_path, "dequantized")


class Strings(list[str]):
    """A setting with a list, in a case that is a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


def adapted(place: Place, cell: Case) -> set[str]:
    strategy, _, _ = parts.set_up(place, cell)
    return {
        f"{type(layer).__mro__[1].__module__}: {type(layer.get_base_layer()).__name__}"
        for layer in strategy.model.modules()
        if isinstance(layer, LoraLayer)
    }


def test_adapters_are_pefts_own_around_our_layers(ranks: Any, tiny: Path, rows_file: Path) -> None:
    assert ranks.run(1, adapted, case(tiny, rows_file, "nf4")) == [
        {"peft.tuners.lora.layer: QuantisedLinear"}
    ]
