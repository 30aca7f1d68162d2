"""Blocks that a model repeats at several depths (Zamba): one adapter at all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from launcher.chat.model import _load_model
from launcher.chat.target import find_target
from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.method import build_method
from tests.helpers.checkpoints import QUESTION, save_and_answer
from tests.helpers.exports import consolidate, stored
from tests.helpers.parts import Case
from tests.helpers.tiny_models import release

FIRST, SECOND = "model.layers.1.shared_transf", "model.layers.2.shared_transf"
Q, K = "self_attn.q_proj", "self_attn.k_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shared")
    for name in ("zamba", "zamba2"):
        release(name, folder / name)
    return {name: folder / name for name in ("zamba", "zamba2")}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=QUESTION, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("name", "strategy", "options"),
    [
        ("zamba2", "zero3", {}),
        ("zamba", "ddp", {"dora": True}),
        ("zamba2", "fsdp", {"target_modules": ["q_proj", "in_proj"]}),
    ],
    ids=["zero3", "ddp-dora", "fsdp-named"],
)
def test_the_export_is_the_trained_model_and_so_is_the_adapter_beside_the_base(
    ranks: Any,
    bases: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    name: str,
    strategy: str,
    options: dict[str, Any],
) -> None:
    case = Case(
        bases[name], rows_file, strategy=strategy, method_options=options, steps=2,
        learning_rate=5e-2, global_batch_size=4,
    )  # fmt: skip
    answer, _ = ranks.run(2, save_and_answer, case, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    consolidate(checkpoint, "--output", tmp_path / "out")
    assert stored(bases[name]).keys() == stored(tmp_path / "out").keys()
    scale = 1e-4 * answer.abs().max()
    assert (logits(load(bases[name])) - answer).abs().max() > scale
    assert (logits(load(tmp_path / "out")) - answer).abs().max() < scale
    adapted = PeftModel.from_pretrained(load(bases[name]), checkpoint / "adapter")
    assert (logits(adapted) - answer).abs().max() < scale
    target = find_target(checkpoint, bases[name])
    in_chat = _load_model(target, torch.float32, "cpu")  # PEFT would merge the delta twice
    assert (logits(in_chat) - answer).abs().max() < scale


def test_shared_layers_are_quantized_once(
    ranks: Any, bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """As in one process, where the layers have their values before they are quantized."""
    case = Case(
        bases["zamba2"], rows_file, method="qlora", steps=1, learning_rate=0.0, global_batch_size=4
    )
    answer, _ = ranks.run(2, save_and_answer, case, tmp_path / "run")
    alone = build_method(case.config().method).prepare(load(bases["zamba2"]), 0)
    assert (logits(alone) - answer).abs().max() < 1e-4 * answer.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": [f"{SECOND}.{Q}"]},
            rf"{SECOND}.{Q} is adapted and {FIRST}.{Q} is not, but they share a weight",
        ),
        (
            {"rank_pattern": {f"layers.2.shared_transf.{Q}": 2}},
            "rank_pattern.* share a weight, and have one adapter → the same rank",
        ),
        ({"pissa": True}, "method.pissa=True: .* share a weight, which would change twice"),
        (
            {"modules_to_save": ["k_proj"]},
            rf"{FIRST}.{K} and {SECOND}.{K} share a weight, of which each would train a copy",
        ),
    ],
    ids=["one-place", "ranks", "pissa", "modules_to_save"],
)
def test_what_needs_two_weights_is_refused(
    bases: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    config = LoraConfig(**{"name": "lora", "rank": 4, "target_modules": ["q_proj"], **options})
    with pytest.raises(UserError, match=message):
        build_method(config).prepare(load(bases["zamba"]), 0)


def test_adapters_of_peft_that_differ_are_not_merged(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT trains one at each place, and merges all of them into the weight."""
    config = PeftConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(load(bases["zamba"]), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="share a weight, and their adapters differ"):
        consolidate(tmp_path / "adapter", "--base", bases["zamba"], "--output", tmp_path / "out")
