"""Dequantized weights are bit-identical to those of bitsandbytes and transformers on a CPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.quantized import dequantize_tensors, quantize_round_trip
from launcher.export.quantized.round_trip import RoundTrip4Bit, RoundTrip8Bit
from launcher.io.readers.safetensors_file import read_header
from launcher.io.tensor import Tensor, in_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((128, 64), (33, 50), (7, 33), (300, 96), (1, 30), (2, 5000), (640, 65))
SCHEMES: dict[str, dict[str, Any]] = {
    f"{kind}{' nested' * nested}": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    for kind, nested in itertools.product(("nf4", "fp4"), (False, True))
}
SCHEMES["int8"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
Model = transformers.PreTrainedModel


def weights(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    values.view(-1)[:70] = 0  # a block of zeros
    values.view(-1)[-3] = 0.5
    return values.to(dtype)


def assert_bits(tensor: Tensor, expected: torch.Tensor) -> None:
    """All at once, in tiles that start and end inside a block, and by the slow implementation."""
    assert (tensor.dtype, tensor.shape) == (expected.dtype, tuple(expected.shape))
    assert torch.equal(tensor.read_all(), expected)
    cuts = sorted({0, tensor.rows // 3, tensor.rows // 2 + 1, tensor.rows})
    for first, last in itertools.pairwise(cuts):
        assert torch.equal(tensor.read(first, last), expected[first:last])
        exact = tensor.reference(first, last)
        assert exact.dtype == torch.float64
        assert torch.equal(exact.to(tensor.dtype), expected[first:last])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """The mean of the magnitudes depends on it in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_4_bit_round_trip_matches_bitsandbytes(
    kind: str, nested: bool, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        of = weights(shape, dtype)
        packed, state = bnb.quantize_4bit(of.clone(), compress_statistics=nested, quant_type=kind)
        if of.numel() % 64 == 0:  # its kernel for AVX-512 errs where 16 divides a row and 64 not
            state.shape = torch.Size((of.numel() // 64, 64))
        expected = bnb.dequantize_4bit(packed, state).view(shape)
        through = RoundTrip4Bit("w", dtype, shape, in_memory("w", of, Path("w")), kind, nested)
        assert_bits(through, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_8_bit_round_trip_matches_bitsandbytes(dtype: torch.dtype) -> None:
    for shape in SHAPES[:-2]:
        of = weights(shape, dtype)
        of[0] = 0
        whole, absmax, _ = bnb.int8_vectorwise_quant(of.half())
        expected = bnb.int8_vectorwise_dequant(whole, absmax).to(dtype)
        assert_bits(RoundTrip8Bit("w", dtype, shape, in_memory("w", of, Path("w"))), expected)


def test_a_tie_is_rounded_as_bitsandbytes_rounds_it() -> None:
    for kind in ("nf4", "fp4"):
        values = bnb.get_4bit_type(kind, device="cpu").sort().values
        halfway = torch.cat([(values[:-1] + values[1:]) / 2, values, torch.zeros(33)]).view(2, 32)
        near = torch.stack(
            [halfway, halfway.nextafter(-torch.ones(())), halfway.nextafter(values[-1])]
        )
        of = near.reshape(-1, 64).clone()
        of[:, -1] = 1
        expected = bnb.dequantize_4bit(*bnb.quantize_4bit(of, quant_type=kind))
        through = RoundTrip4Bit(
            "w", of.dtype, tuple(of.shape), in_memory("w", of, Path("w")), kind, False
        )
        assert_bits(through, expected)


def test_a_weight_with_a_nan_is_not_quantized() -> None:
    of = weights((64, 64), torch.bfloat16)
    of[3, 3] = float("nan")
    tensor = RoundTrip4Bit("w", of.dtype, (64, 64), in_memory("w", of, Path("w")), "nf4", False)
    with pytest.raises(UserError, match="w contains a NaN"):
        tensor.read_all()


def make(folder: Path, architecture: str, **settings: Any) -> Path:
    transformers.set_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**settings)).bfloat16()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plain"), "LlamaForCausalLM", **SIZES)


def load(folder: Path, scheme: dict[str, Any]) -> Model:
    quantized = transformers.BitsAndBytesConfig(
        **{key: value for key, value in scheme.items() if key != "quant_method"}
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantized, device_map="cpu"
    )


@pytest.fixture(scope="module")
def saved(
    plain: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """A quantized folder, and what transformers dequantizes it to."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def get(scheme: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if scheme not in made:
            folder = tmp_path_factory.mktemp("quantized")
            load(plain, SCHEMES[scheme]).save_pretrained(folder)
            again = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
            made[scheme] = folder, again.dequantize().state_dict()
        return made[scheme]

    return get


def opened(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = read_header(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_folder_is_dequantized(scheme: str, saved: Any) -> None:
    folder, expected = saved(scheme)
    tensors, config = dequantize_tensors(*opened(folder))
    assert "quantization_config" not in config
    assert config["model_type"] == "llama"
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            assert_bits(tensor, expected[name].to(torch.bfloat16))
        assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_round_trip_gives_the_weights_used_in_training(
    scheme: str, saved: Any, plain: Path
) -> None:
    tensors = quantize_round_trip(*opened(plain), SCHEMES[scheme])
    for name, expected in saved(scheme)[1].items():
        assert torch.equal(tensors[name].read_all(), expected.to(torch.bfloat16)), name


def test_4_bits_stored_as_another_dtype_are_read(plain: Path, tmp_path: Path, saved: Any) -> None:
    load(plain, SCHEMES["nf4"] | {"bnb_4bit_quant_storage": "bfloat16"}).save_pretrained(tmp_path)
    assert torch.bfloat16 in {t.dtype for n, t in opened(tmp_path)[0].items() if "q_proj" in n}
    tensors, _ = dequantize_tensors(*opened(tmp_path))
    for name, expected in saved("nf4")[1].items():
        assert torch.equal(tensors[name].read_all(), expected), name


def test_a_folder_that_is_not_quantized_is_not_changed(plain: Path) -> None:
    assert dequantize_tensors(*opened(plain)) == opened(plain)


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        ("nf4", "weight"),
        ("nf4", "weight.absmax"),
        ("nf4 nested", "weight.nested_quant_map"),
        ("nf4 nested", "weight.quant_state.bitsandbytes__nf4"),
        ("int8", "weight"),
        ("int8", "SCB"),
    ],
)
def test_a_missing_part_is_an_error(scheme: str, part: str, saved: Any) -> None:
    tensors, config = opened(saved(scheme)[0])
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.\S+ is .* missing"):
        dequantize_tensors(tensors, config)


@pytest.mark.parametrize("method", ["gptq", "awq", "quark"])
def test_other_quantizations_are_refused(method: str, plain: Path) -> None:
    tensors, config = opened(plain)
    config = config | {"quantization_config": {"quant_method": method}}
    packed = torch.zeros(4, 8, dtype=torch.int32)
    tensors["model.layers.0.self_attn.q_proj.qweight"] = in_memory("qweight", packed, plain)
    with pytest.raises(UserError, match=f"quant_method {method} .* → use the folder"):
        dequantize_tensors(tensors, config)
    with pytest.raises(UserError, match=method):
        quantize_round_trip(tensors, config, {"quant_method": method, "load_in_4bit": True})


TIED = {"tie_word_embeddings": True}
MOE = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}


@pytest.mark.parametrize(
    ("architecture", "settings", "skipped"),
    [
        ("LlamaForCausalLM", SIZES | TIED, None),
        ("LlamaForCausalLM", SIZES, ["q_proj", "lm_head"]),
        ("LlamaForCausalLM", SIZES, ["model.layers.1"]),
        ("Qwen3MoeForCausalLM", SIZES | MOE, None),
        ("GPT2LMHeadModel", GPT2, None),
    ],
)
def test_the_same_weights_are_quantized_as_in_transformers(
    architecture: str, settings: dict[str, Any], skipped: list[str] | None, tmp_path: Path
) -> None:
    folder = make(tmp_path, architecture, **settings)
    scheme = SCHEMES["nf4"] | {"llm_int8_skip_modules": skipped}
    model = load(folder, scheme)
    model_class = getattr(transformers, architecture)
    source = model_class.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    memory = {name: in_memory(name, value, folder) for name, value in source.items()}
    found = quantize_round_trip(memory, opened(folder)[1], scheme)
    live = {name for name, value in model.named_parameters() if "Params4bit" in str(type(value))}
    assert {name for name in found if found[name] is not memory[name]} == live
    transpose = architecture.startswith("GPT2")
    for name in sorted(live)[:4]:
        parameter = model.get_parameter(name)
        expected = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(found[name].read_all(), expected.T if transpose else expected)


def test_a_tied_head_that_was_quantized_is_refused(tmp_path: Path) -> None:
    tensors, config = opened(make(tmp_path, "LlamaForCausalLM", **SIZES, **TIED))
    with pytest.raises(UserError, match="leaves out lm_head, which is tied"):
        quantize_round_trip(tensors, config, SCHEMES["nf4"] | {"llm_int8_skip_modules": ["q_proj"]})


@pytest.mark.parametrize(
    "architecture",
    ["Gemma", "Gemma2", "Granite", "Llama", "Mistral", "Olmo2", "Qwen2", "Qwen3", "SmolLM3"],
)
def test_linear_weights_found_by_name_match_the_model_class(architecture: str) -> None:
    from launcher.export.quantized.dequantize import _linear_by_class, _linear_weights

    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**SIZES, pad_token_id=0, architectures=[f"{architecture}ForCausalLM"])
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    tensors = {n: in_memory(n, value, Path()) for n, value in model.state_dict().items()}
    by_name = _linear_weights(tensors, config.to_dict(), {})
    assert set(by_name) == set(_linear_by_class(config.to_dict(), None)) != set()


def test_8_bit_weights_need_a_dtype(saved: Any) -> None:
    tensors, config = opened(saved("int8")[0])
    text = {"text_config": {"dtype": config.pop("dtype")}}
    name = "model.layers.0.mlp.up_proj.weight"
    assert dequantize_tensors(tensors, config | text)[0][name].dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"config\.json names no dtype"):
        dequantize_tensors(tensors, config)


def test_a_damaged_state_is_an_error(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("nf4")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored[f"{name}.absmax"] = stored[f"{name}.absmax"][1:].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight: .* do not make up"):
        dequantize_tensors(read_header(tmp_path / "model.safetensors"), opened(folder)[1])
