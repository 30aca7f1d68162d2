"""A composite is trained as its text model, and exported as the composite again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from launcher.checkpoint.load import describe_frozen_since
from launcher.distributed.process_group import RankInfo
from launcher.folders import manifest
from launcher.folders.adapter import WEIGHTS
from launcher.folders.checkpoint import Checkpoint
from launcher.method import full
from tests.helpers import parts
from tests.helpers.checkpoints import (
    END,
    QUESTION,
    STOP,
    restore,
    run_steps,
    save_and_answer,
    six_steps,
)
from tests.helpers.composites import COMPOSITES, load_composite, make_composite
from tests.helpers.exports import consolidate, stored
from tests.helpers.parts import Case

TRAINED = {
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "mllama": "MllamaForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "MistralForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
PARTS = ("visual", "vision_model", "vision_tower", "projector", "mtp")  # that are not trained


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("composites")
    return {name: make_composite(name, folder / name) for name in TRAINED}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=QUESTION).logits
    return found


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_composite_is_exported_whole(
    ranks: Any, bases: dict[str, Path], rows_file: Path, tmp_path: Path, name: str, method: str
) -> None:
    base, linear = bases[name], name.startswith("qwen3_5")
    # Endings that modules of the vision tower have, too.
    targets = {"target_modules": ["q_proj", "o_proj", "gate_proj", "in_proj_qkv"][: 3 + linear]}
    case = Case(
        base, rows_file, method=method, steps=2, learning_rate=5e-2, global_batch_size=4,
        method_options=targets if method == "lora" else {},
    )  # fmt: skip
    answer, _ = ranks.run(2, save_and_answer, case, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    assert manifest.read(checkpoint / "manifest.json")["class"] == TRAINED[name]

    consolidate(checkpoint, "--output", tmp_path / "out", "--max-shard-size", "100KB")
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if any(part in key for part in PARTS):
            assert torch.equal(after[key], tensor), key
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
        COMPOSITES[name][0]
    ]
    exported = load_composite(name, tmp_path / "out")
    assert not torch.allclose(answer, logits(load_composite(name, base)), atol=1e-4)
    assert torch.allclose(answer, logits(exported), atol=1e-5)
    if method == "lora":
        adapted = PeftModel.from_pretrained(load_composite(name, base), checkpoint / "adapter")
        names = {key.replace(".default", "") for key in adapted.state_dict() if "lora_" in key}
        assert names == load_file(checkpoint / "adapter/adapter_model.safetensors").keys()
        assert torch.allclose(answer, logits(adapted), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "strategy", "method"),
    [
        ("qwen3_vl", "zero1", "full"),
        ("mistral3", "zero2", "full"),
        ("gemma3", "ddp", "full"),
        ("gemma3", "zero3", "full"),
        ("mistral3", "zero3", "lora"),
        ("qwen3_5", "fsdp", "qlora"),
        ("qwen3_vl", "ddp", "qlora"),
    ],
)
def test_every_strategy_exports_a_composite_whole(
    ranks: Any,
    bases: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    name: str,
    strategy: str,
    method: str,
) -> None:
    """The parts that text does not reach keep their bytes, also under weight decay: ZeRO has a
    gradient of zeros for them, and AdamW would shrink them."""
    case = Case(
        bases[name], rows_file, method=method, strategy=strategy, steps=2, learning_rate=5e-2,
        weight_decay=0.1, global_batch_size=4,
    )  # fmt: skip
    answer, _ = ranks.run(2, save_and_answer, case, tmp_path / "run")
    consolidate(tmp_path / "run/checkpoints/step-000002", "--output", tmp_path / "out")
    before, after = stored(bases[name]), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if any(part in key for part in PARTS):
            assert torch.equal(after[key], tensor), key
    exported = logits(load_composite(name, tmp_path / "out"))
    if method == "qlora":  # the base of the answer is quantized
        assert not torch.allclose(exported, logits(load_composite(name, bases[name])), atol=1e-4)
    else:
        assert torch.allclose(answer, exported, atol=1e-5)


def test_a_tower_that_never_runs_does_not_disturb_summed_gradients(
    ranks: Any, bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """In bf16, FSDP2 casts what it sums before it reduces it."""
    case = Case(
        bases["qwen3_vl"], rows_file, precision="bf16", strategy_options={"gradient_sync": "last"},
        steps=2, learning_rate=5e-2, global_batch_size=4,
    )  # fmt: skip
    answer, _ = ranks.run(2, save_and_answer, case, tmp_path / "run")
    assert answer.isfinite().all()


def test_a_run_resumes_from_an_adapter_of_the_composite(
    ranks: Any, bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(bases["qwen3_5"], rows_file, "lora", "fsdp")
    straight = ranks.run(2, run_steps, case, tmp_path / "straight", 0, END)[0]
    ranks.run(2, run_steps, case, tmp_path / "parts", 0, STOP)
    adapter = tmp_path / f"parts/checkpoints/step-{STOP:06d}/adapter"
    assert any(".language_model." in name for name in load_file(adapter / WEIGHTS))
    resumed = ranks.run(2, run_steps, case, tmp_path / "parts", STOP, END)[0]
    assert resumed == straight[STOP:]
    with_names_of_earlier_versions(adapter)
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    adapter.parent.rename(tmp_path / f"old/checkpoints/step-{STOP:06d}")
    assert ranks.run(2, run_steps, case, tmp_path / "old", STOP, END)[0] == straight[STOP:]


@pytest.mark.parametrize("key", ["adapter", "merge_first"])
def test_a_run_goes_on_with_an_adapter_of_the_composite(
    ranks: Any, bases: dict[str, Path], rows_file: Path, tmp_path: Path, key: str
) -> None:
    """`method.adapter` trains it on, `method.merge_first` trains another one on top of it."""
    base = bases["qwen3_5"]
    first = Case(
        base, rows_file, steps=2, learning_rate=5e-2, global_batch_size=4,
        method_options={"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    )  # fmt: skip
    ranks.run(2, save_and_answer, first, tmp_path / "first")
    adapter = tmp_path / "first/checkpoints/step-000002/adapter"
    given = {"adapter": str(adapter)} if key == "adapter" else {"merge_first": [str(adapter)]}
    second = replace(first, method_options=given)
    answer, _ = ranks.run(2, save_and_answer, second, tmp_path / "second")
    checkpoint = tmp_path / "second/checkpoints/step-000002"
    adapted = PeftModel.from_pretrained(load_composite("qwen3_5", base), checkpoint / "adapter")
    assert torch.allclose(answer, logits(adapted), atol=1e-5)
    consolidate(checkpoint, "--output", tmp_path / "out")
    assert torch.allclose(answer, logits(load_composite("qwen3_5", tmp_path / "out")), atol=1e-5)


def with_names_of_earlier_versions(adapter: Path) -> None:
    """Give the tensors the names of the text model."""
    tensors = load_file(adapter / WEIGHTS)
    renamed = {name.replace(".language_model.", "."): each for name, each in tensors.items()}
    save_file(renamed, adapter / WEIGHTS, {"format": "pt"})


def train_as_before(rank_info: RankInfo, case: Case, folder: Path) -> list[float]:
    """As versions did that trained towers, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full, "non_text_paths", lambda model: [])
        return run_steps(rank_info, case, folder, 0, 1)


def resume_and_describe(rank_info: RankInfo, case: Case, folder: Path) -> str | None:
    state, _ = parts.set_up(rank_info, case)
    restore(state, folder, 1)
    return describe_frozen_since(Checkpoint(folder / "checkpoints/step-000001"), state)


def test_a_run_that_trained_its_towers_is_resumed_with_a_sentence(
    ranks: Any, bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    case = Case(
        bases["gemma3"], rows_file, method="full", strategy="zero2", steps=2, global_batch_size=4
    )
    ranks.run(2, train_as_before, case, tmp_path / "old")
    line, _ = ranks.run(2, resume_and_describe, case, tmp_path / "old")
    assert line is not None
    assert "step-000001 is of a version that gave vision and audio towers" in line
    ranks.run(2, run_steps, case, tmp_path / "new", 0, 1)
    assert ranks.run(2, resume_and_describe, case, tmp_path / "new") == [None, None]
