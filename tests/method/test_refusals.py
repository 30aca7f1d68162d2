"""What a method cannot do with a model is said in one sentence, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.method.offsets import LowRank, joined, settings_of
from tests.helpers import parts
from tests.helpers.exports import make_adapter
from tests.helpers.parts import Case


def prepared(model: Path, method: str, **options: Any) -> Any:
    return parts.plain_model(
        Case(model, model, method=method, method_options=tuple(options.items()))
    )


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("freeze", {"layers": 9}, r"method.layers=9, and the model has 2 layers"),
        ("freeze", {"layers": -3}, r"method.layers=-3, and the model has 2 layers"),
        ("freeze", {"modules": ["attention"]}, r"attention is the name of no module .*self_attn"),
        ("freeze", {"extra_modules": ["q_proj"]}, r"q_proj is the name of no .*embed_tokens"),
        ("freeze", {"extra_modules": ["rotary_emb"]}, r"rotary_emb is the name of no module"),
        ("lora", {"rank_pattern": {"w_proj": 4}}, "rank_pattern: w_proj is the name of no"),
        ("lora", {"alpha_pattern": {"lm_head": 4.0}}, "alpha_pattern: lm_head is the name of no"),
        ("lora", {"modules_to_save": ["head"]}, "modules_to_save: head is the name of no module"),
        ("lora", {"pissa": True, "rank": 200}, "rank 200 is more than .*q_proj has directions"),
        ("lora", {"adapter": "/nowhere"}, "method.adapter=/nowhere holds no adapter"),
    ],
)
def test_one_sentence_each(tiny: Path, method: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        prepared(tiny, method, **options)


def test_an_adapter_that_is_more_than_lora_is_not_merged_first(tiny: Path, tmp_path: Path) -> None:
    saved = make_adapter(tiny, tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"no plain LoRA \(.*lm_head.*shardway consolidate"):
        prepared(tiny, "lora", merge_first=[str(saved)])


def test_what_is_merged_first_is_not_trained_whole(tiny: Path, tmp_path: Path) -> None:
    one = make_adapter(tiny, tmp_path / "one")
    with pytest.raises(UserError, match=r"which method.modules_to_save trains"):
        prepared(
            tiny, "lora", merge_first=[str(one)],
            modules_to_save=["q_proj"], target_modules=["v_proj"],
        )  # fmt: skip


def test_an_adapter_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    one = make_adapter(tiny, tmp_path / "one", target_modules=["q_proj"])
    tensors = load_file(one / "adapter_model.safetensors")
    wide = {
        name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()
    }
    save_file(wide, one / "adapter_model.safetensors")
    for key in ("adapter", "merge_first"):
        value: Any = str(one) if key == "adapter" else [str(one)]
        with pytest.raises(UserError, match=r"another model's|its delta"):
            prepared(tiny, "lora", **{key: value})


def test_offsets_become_one_adapter_of_larger_rank() -> None:
    torch.manual_seed(0)
    own, other = (LowRank(torch.randn(5, r), torch.randn(r, 7)) for r in (2, 3))
    every = joined({"a": (own, 0.5)}, {"a": other, "b": other})
    low, scale = every["a"]
    torch.testing.assert_close(scale * low.product(), 0.5 * own.product() + other.product())
    said = settings_of(every)
    ranks = {"a": 5, "b": 3}
    for module, (low, scale) in every.items():
        rank = said["rank_pattern"].get(module, said["r"])
        assert rank == len(low.right) == ranks[module]
        assert said["alpha_pattern"].get(module, said["lora_alpha"]) / rank == scale
