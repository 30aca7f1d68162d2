"""Every kind of LoRA adapter is merged to the bits that PEFT's own merge gives."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.export.merge import Merged, merge, read_adapter
from launcher.export.tensor import Tensor, held

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
WIDE = {"num_hidden_layers": 1, "vocab_size": 1001}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _model(kind: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    made = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        "llama_bias": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
        ),
        "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, tie_word_embeddings=False)),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **MOE)),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        ),
        "gpt_oss": lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(
                **{**SIZES, "intermediate_size": 32},
                num_local_experts=4,
                num_experts_per_tok=2,
                head_dim=8,
            )
        ),
        "wide": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**{**SIZES, **WIDE, "hidden_size": 512, "intermediate_size": 1408})
        ),
        "wide gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=1001, n_embd=384, n_layer=1, n_head=4, n_positions=64)
        ),
        "llava": lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
                vision_config=tf.CLIPVisionConfig(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=16,
                    patch_size=8,
                ),
                tie_word_embeddings=True,
            )
        ),
    }[kind]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one's own, always with the same weights."""
    return copy.deepcopy(_model(kind)).to(dtype)


def trained(
    folder: Path, kind: str, prepare: Callable[[Any], Any] = lambda model: model, **settings: Any
) -> Path:
    """An adapter folder as save_pretrained writes it, every trainable value drawn anew."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 6, "lora_alpha": 10, "task_type": "CAUSAL_LM", **settings}
    peft_model = get_peft_model(prepare(model(kind)), LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean="magnitude" in name, std=0.2)
    peft_model.save_pretrained(folder)
    return folder


def in_dtype(adapter: Path, dtype: torch.dtype, folder: Path) -> Path:
    folder.mkdir()
    file = "adapter_model.safetensors"
    values = {name: tensor.to(dtype) for name, tensor in load_file(adapter / file).items()}
    save_file(values, folder / file, {"format": "pt"})
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


def tensors_of(live: Any) -> dict[str, Tensor]:
    """As a reader gives them: a tied head is not there."""
    state = live.state_dict()
    if live.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return {name: held(name, tensor, Path("base")) for name, tensor in state.items()}


def merged(live: Any, *adapters: Path, **options: Any) -> Merged:
    config = json.loads(live.config.to_json_string(use_diff=False))
    config["architectures"] = [type(live).__name__]
    return merge(tensors_of(live), config, [read_adapter(each) for each in adapters], **options)


def by_peft(live: Any, *adapters: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    for adapter in adapters:
        live = PeftModel.from_pretrained(live, adapter).merge_and_unload()
    state: dict[str, torch.Tensor] = live.state_dict()
    return state


def assert_equal(result: Merged, expected: dict[str, torch.Tensor]) -> None:
    different = [
        name
        for name, tensor in result.tensors.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor.whole(), expected[name])
    ]
    assert not different, f"{len(different)} of {len(expected)}: {different[:3]}"


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
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """The folder of a variant's adapter, its file in a dtype; made once."""
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
def test_a_merge_has_the_bits_of_pefts(
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
def test_the_slow_way_agrees_to_the_last_place(
    variant: str, adapters: Callable[[str, torch.dtype], Path]
) -> None:
    kind, _ = VARIANTS[variant]
    for dtype in DTYPES:
        result = merged(model(kind, dtype), adapters(variant, torch.float32))
        for name, action in result.actions.items():
            if action == "copied":
                continue
            tensor = result.tensors[name]
            exact = tensor.exact(0, tensor.rows)
            got = tensor.read(0, tensor.rows)
            info = torch.finfo(dtype)
            ulp = info.eps * exact.abs().clamp(min=info.tiny)
            cancelled = 8 * torch.finfo(torch.float32).eps  # of terms of about 1, summed in fp32
            if getattr(tensor, "delta_first", False) or "experts" in action:
                cancelled += info.eps  # a delta of about 1, rounded to the other side
            assert ((got.double() - exact).abs() <= ulp + cancelled).all(), name


@pytest.mark.parametrize("variant", ["linear", "conv1d", "conv1d dora", "dora", "experts"])
def test_the_bits_do_not_depend_on_the_rows_asked_for(
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
def test_many_spans_in_many_threads_have_the_bits_of_the_whole(
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
def test_another_dtype_is_rounded_to_once(
    variant: str, adapters: Callable[[str, torch.dtype], Path]
) -> None:
    kind, _ = VARIANTS[variant]
    folder = adapters(variant, torch.float32)
    result = merged(model(kind, torch.bfloat16), folder)
    wide = merged(model(kind, torch.bfloat16).float(), folder)
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor.to(torch.float32).whole(), wide.tensors[name].whole()), name
