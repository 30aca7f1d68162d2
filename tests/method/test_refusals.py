"""If a method cannot train a model, it is refused with one message before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.method.initial_delta import LowRankDelta, add_initial_deltas, rank_settings
from tests.helpers import parts
from tests.helpers.exports import make_adapter
from tests.helpers.parts import Case


def prepared(model: Path, method: str, **options: Any) -> Any:
    return parts.plain_model(Case(model, model, method=method, method_options=options))


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("freeze", {"layers": 9}, r"method.layers=9, but the model has 2 layers"),
        ("freeze", {"layers": -3}, r"method.layers=-3, but the model has 2 layers"),
        (
            "freeze",
            {"modules": ["attention"]},
            r"no module inside a layer is named attention.*self_attn",
        ),
        ("freeze", {"extra_modules": ["q_proj"]}, r"no module .* is named q_proj.*embed_tokens"),
        ("freeze", {"extra_modules": ["rotary_emb"]}, r"no module .* is named rotary_emb"),
        (
            "lora",
            {"rank_pattern": {"w_proj": 4}},
            "rank_pattern: no adapted module is named w_proj",
        ),
        # A pattern names complete parts of a module's path.
        ("lora", {"rank_pattern": {"proj": 4}}, "rank_pattern: no adapted module is named proj"),
        ("lora", {"rank_pattern": {"q_pro": 4}}, "rank_pattern: no adapted module is named q_pro"),
        (
            "lora",
            {"alpha_pattern": {"lm_head": 4.0}},
            "alpha_pattern: no adapted module is named lm_head",
        ),
        ("lora", {"modules_to_save": ["head"]}, "modules_to_save: no module is named head"),
        ("lora", {"pissa": True, "rank": 200}, "rank 200 is more than .* directions of .*q_proj"),
        ("lora", {"adapter": "/nowhere"}, "method.adapter=/nowhere contains no adapter"),
    ],
)
def test_each_refusal_has_its_message(
    tiny: Path, method: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        prepared(tiny, method, **options)


def test_an_adapter_that_is_more_than_lora_is_not_merged_first(tiny: Path, tmp_path: Path) -> None:
    saved = make_adapter(tiny, tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(
        UserError, match=r"not a plain LoRA adapter \(.*lm_head.*shardway consolidate"
    ):
        prepared(tiny, "lora", merge_first=[str(saved)])


def test_an_adapter_merged_into_a_module_to_save_is_refused(tiny: Path, tmp_path: Path) -> None:
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
        with pytest.raises(UserError, match=r"another model|its delta"):
            prepared(tiny, "lora", **{key: value})


def test_initial_deltas_become_one_adapter_of_larger_rank() -> None:
    torch.manual_seed(0)
    own, other = (LowRankDelta(torch.randn(5, r), torch.randn(r, 7)) for r in (2, 3))
    every = add_initial_deltas({"a": (own, 0.5)}, {"a": other, "b": other})
    low, scale = every["a"]
    torch.testing.assert_close(scale * low.product(), 0.5 * own.product() + other.product())
    said = rank_settings(every)
    ranks = {"a": 5, "b": 3}
    for module, (low, scale) in every.items():
        rank = said["rank_pattern"].get(module, said["r"])
        assert rank == len(low.right) == ranks[module]
        assert said["alpha_pattern"].get(module, said["lora_alpha"]) / rank == scale
