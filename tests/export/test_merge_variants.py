"""The merge of every kind of LoRA adapter is bit-identical to PEFT's own merge."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.merging import assert_equal, by_peft, in_dtype, merged, model, trained

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ATTENTION = ["q_proj", "k_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "down_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": LINEAR}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 3, "layers.1.*down_proj": 12, ".*o_proj": 5},
            "alpha_pattern": {r"layers\.0\.self_attn\.k_proj": 7, "proj_": 3},
        },
    ),
    "biases": ("qwen2", {"target_modules": LINEAR}),
    "bias all": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("llama_bias", {"target_modules": LINEAR, "lora_bias": True}),
    "lora_bias, bias all": (
        "llama_bias",
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"},
    ),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d, bias all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 100]},
    ),
    "tied tokens": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3]}},
    ),
    "mica": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
    "parameters": (
        "llama",
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "up_proj.weight"]},
    ),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "one parameter of experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["experts.down_proj", "mlp.gate.weight"]},
    ),
    "experts [in, out]": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "experts without gates, of equal shapes": (
        "nemotron_h",
        {"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
    ),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """The adapter folder of a variant, with its file in the given dtype; created once."""
    root = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def adapter(variant: str, dtype: torch.dtype) -> Path:
        folder = root / f"{len(list(root.iterdir()))}"
        if dtype != torch.float32:
            return in_dtype(adapter(variant, torch.float32), dtype, folder)
        kind, settings = VARIANTS[variant]
        return trained(folder, kind, **settings)

    return adapter


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_is_bit_identical_to_peft(
    variant: str,
    dtype: torch.dtype,
    file_dtype: torch.dtype,
    adapters: Callable[[str, torch.dtype], Path],
) -> None:
    kind, _ = VARIANTS[variant]
    folder = adapters(variant, file_dtype)
    result = merged(model(kind, dtype), folder)
    assert_equal(result, by_peft(model(kind, dtype), folder))
    assert any(action != "copied" for action in result.actions.values())
    assert result.config == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_slow_implementation_agrees_to_the_last_place(
    variant: str, adapters: Callable[[str, torch.dtype], Path]
) -> None:
    kind, _ = VARIANTS[variant]
    for dtype in DTYPES:
        result = merged(model(kind, dtype), adapters(variant, torch.float32))
        for name, action in result.actions.items():
            if action == "copied":
                continue
            tensor = result.tensors[name]
            exact = tensor.reference(0, tensor.rows)
            got = tensor.read(0, tensor.rows)
            info = torch.finfo(dtype)
            ulp = info.eps * exact.abs().clamp(min=info.tiny)
            cancelled = 8 * torch.finfo(torch.float32).eps  # of terms of about 1, summed in fp32
            if getattr(tensor, "delta_first", False) or "experts" in action:
                cancelled += info.eps  # a delta of about 1, rounded to the other side
            assert ((got.double() - exact).abs() <= ulp + cancelled).all(), name


@pytest.mark.parametrize("variant", ["linear", "conv1d", "conv1d dora", "dora", "experts"])
def test_the_bits_do_not_depend_on_the_requested_rows(
    variant: str, adapters: Callable[[str, torch.dtype], Path]
) -> None:
    kind, _ = VARIANTS[variant]
    result = merged(model(kind, torch.bfloat16), adapters(variant, torch.bfloat16))
    for name, action in result.actions.items():
        tensor = result.tensors[name]
        if action == "copied" or tensor.rows < 2:
            continue
        whole = tensor.read(0, tensor.rows)
        for first, last in (
            (0, 1),
            (tensor.rows - 1, tensor.rows),
            (tensor.rows // 3, tensor.rows // 2),
        ):
            assert torch.equal(tensor.read(first, last), whole[first:last]), name


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("wide", [*LINEAR, "embed_tokens"]), ("wide gpt2", ["c_attn", "c_proj", "c_fc"])],
)
def test_many_spans_in_many_threads_equal_one_complete_merge(
    kind: str, targets: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = trained(tmp_path / "adapter", kind, target_modules=targets, **settings)
    expected = by_peft(model(kind, torch.bfloat16), folder)
    result = merged(model(kind, torch.bfloat16), folder)
    with ThreadPoolExecutor(4) as pool:
        parts = {
            (name, first): pool.submit(tensor.read, first, min(first + 300, tensor.rows))
            for name, tensor in result.tensors.items()
            for first in range(0, tensor.rows, 300)
        }
    for (name, first), part in parts.items():
        whole = expected[name].view(result.tensors[name].rows, -1)
        assert torch.equal(part.result(), whole[first : first + 300]), name


@pytest.mark.parametrize("variant", ["linear", "dora", "embedding", "experts", "modules_to_save"])
def test_values_are_rounded_to_another_dtype_once(
    variant: str, adapters: Callable[[str, torch.dtype], Path]
) -> None:
    kind, _ = VARIANTS[variant]
    folder = adapters(variant, torch.float32)
    result = merged(model(kind, torch.bfloat16), folder)
    wide = merged(model(kind, torch.bfloat16).float(), folder)
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor.to(torch.float32).read_all(), wide.tensors[name].read_all()), name
