"""A merge that cannot be exact is refused before any computation, with a suggested fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.merge import Adapter, merge, read_adapter, split_adapters
from launcher.io.tensor import in_memory
from tests.helpers.merging import (
    assert_equal,
    by_peft,
    in_dtype,
    merged,
    model,
    tensors_of,
    trained,
)

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("adapter"), "llama", target_modules=["q_proj", "v_proj"])


def altered(plain: Path, folder: Path, change: Change | None = None, **settings: Any) -> Path:
    """A copy of the adapter with other settings or tensors."""
    shutil.copytree(plain, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "ADALORA"),
        ("peft_type", "VERA"),
        ("peft_type", "IA3"),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 0.1}),
        ("velora_config", {"num_groups": 2}),
        ("monteclora_config", {"num_samples": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of tomorrow"),
        ("use_something_new", True),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    key: str, value: Any, plain: Path, tmp_path: Path
) -> None:
    folder = altered(plain, tmp_path / "adapter", **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json (has|sets) {key}"):
        merged(model("llama"), folder)


def test_every_setting_of_this_peft_is_known() -> None:
    from peft import LoraConfig

    from launcher.io.adapter_config import KNOWN_KEYS

    assert LoraConfig().to_dict().keys() <= KNOWN_KEYS


def rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


FAULTS: dict[str, tuple[Change, str]] = {
    "one too many": (
        lambda t: t.update({"base_model.model.model.layers.0.mlp.extra.weight": torch.ones(3)}),
        r"1 of 9 tensors fit nothing in the base \(model\.layers\.0\.mlp\.extra\.weight \[3\]\)",
    ),
    "no prefix": (
        rename(f"{PREFIX}.lora_A.weight", "layers.0.q_proj.lora_A.weight"),
        r"1 of 8 tensors fit nothing in the base \(layers\.0\.q_proj\.lora_A\.weight\)",
    ),
    "half a pair": (
        lambda t: t.pop(f"{PREFIX}.lora_B.weight"),
        r"layers\.0\.self_attn\.q_proj has lora_A but not lora_B",
    ),
    "another rank": (
        lambda t: t.update(
            {
                f"{PREFIX}.lora_A.weight": torch.ones(5, 32),
                f"{PREFIX}.lora_B.weight": torch.ones(32, 5),
            }
        ),
        r"A \[5, 32\] and B \[32, 5\], which do not fit rank 6",
    ),
    "another shape": (
        lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(6, 40)}),
        r"A \[6, 40\].*another model",
    ),
    "a magnitude without DoRA": (
        lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(32)}),
        "lora_magnitude_vector, which adapter_config.json does not announce",
    ),
    "a weight of another size": (
        lambda t: t.update({f"{PREFIX}.weight": torch.ones(8, 8)}),
        r"fit nothing in the base \(model\.layers\.0\.self_attn\.q_proj\.weight \[8, 8\]\)",
    ),
    "a head of another width": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(101, 40)}),
        r"1 of 9 tensors fit nothing in the base \(lm_head\.weight \[101, 40\]\)",
    ),
    "a head of one dim": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(32)}),
        r"1 of 9 tensors fit nothing in the base \(lm_head\.weight \[32\]\)",
    ),
    "NaN": (
        lambda t: t[f"{PREFIX}.lora_A.weight"].view(-1)[3:4].fill_(float("nan")),
        r"lora_A\.weight contains NaN or infinite values",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_file_is_refused(
    change: Change, sentence: str, plain: Path, tmp_path: Path
) -> None:
    folder = altered(plain, tmp_path / "adapter", change)
    with pytest.raises(UserError, match=sentence):
        merged(model("llama"), folder)


def test_an_adapter_of_another_model_is_refused(plain: Path) -> None:
    with pytest.raises(UserError, match=r"8 of 8 tensors fit nothing .*another model"):
        merged(model("gpt2"), plain)


def test_a_lora_bias_needs_a_bias(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", "llama", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match="the base has no bias"):
        merged(model("llama"), folder)


OVERFLOWS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "LoRA": ("llama", "q_proj.lora_B.weight", "layers.0.self_attn.q_proj.weight", {}),
    "bias": (
        "llama_bias", "q_proj.lora_B.bias", "layers.0.self_attn.q_proj.bias", {"lora_bias": True},
    ),
    "replaced": ("llama", "norm.weight", "norm.weight", {"modules_to_save": ["norm"]}),
    "tokens": (
        "llama", "trainable_tokens_delta", "embed_tokens.weight", {"trainable_token_indices": [7]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "enlarged", "name", "settings"), OVERFLOWS.values(), ids=OVERFLOWS.keys()
)
def test_values_that_overflow_fp16_are_refused(
    kind: str, enlarged: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            tensor *= 1e6 if key.endswith(enlarged) else 1

    valid = trained(tmp_path / "valid", kind, target_modules=["q_proj"], **settings)
    folder = altered(valid, tmp_path / "adapter", enlarge)
    result = merged(model(kind, torch.float16), folder)
    with pytest.raises(UserError, match=rf"\.{name}: \d+ value\(s\).*do not fit float16"):
        result.tensors[f"model.{name}"].read_all()


@pytest.mark.parametrize("indices", [[7, 3, 101], [7, 3, -1], [7, 3]])
def test_token_indices_that_do_not_fit_are_refused(indices: list[int], tmp_path: Path) -> None:
    """The embedding has rows 0 to 100, and the file three trained tokens."""
    tokens = {"trainable_token_indices": [7, 3, 100]}
    valid = trained(tmp_path / "valid", "llama", target_modules=["q_proj"], **tokens)
    assert "3 tokens replaced" in merged(model("llama"), valid).actions.values()
    folder = altered(valid, tmp_path / "adapter", trainable_token_indices=indices)
    message = (
        f"has {indices[2]}, but .* rows 0 to 100"
        if len(indices) == 3
        else r"which fit neither .* \(2\)"
    )
    with pytest.raises(UserError, match=rf"{message}.*belong to another model"):
        merged(model("llama"), folder)


def test_a_quantized_base_is_refused(plain: Path) -> None:
    base = {
        name: in_memory(name, tensor.read_all().to(torch.float8_e4m3fn), Path("base"))
        for name, tensor in tensors_of(model("llama")).items()
    }
    with pytest.raises(UserError, match=r"is float8_e4m3fn.*dequantize"):
        merge(base, {"tie_word_embeddings": False}, [read_adapter(plain)])


def test_lora_on_a_convolution_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "llava", target_modules=["q_proj", "patch_embedding"])
    with pytest.raises(UserError, match=r"patch_embedding is a convolution"):
        merged(model("llava"), folder)


def test_a_tie_that_is_not_known_by_its_name_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "tied", target_modules=["embed_tokens"])

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("embed_tokens", "table"): each for name, each in tensors.items()}

    adapter = read_adapter(folder)
    other = Adapter(folder, adapter.config, rename(adapter.tensors))
    config = {"vocab_size": 101, "tie_word_embeddings": True}
    with pytest.raises(UserError, match="does not know by their names"):
        merge(rename(tensors_of(model("tied"))), config, [other])


def test_a_missing_file_is_named(plain: Path, tmp_path: Path) -> None:
    folder = altered(plain, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        read_adapter(folder)


def test_a_pickled_adapter_is_read_too(plain: Path, tmp_path: Path) -> None:
    folder = altered(plain, tmp_path / "adapter")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    result = merged(model("llama"), folder)
    assert_equal(result, by_peft(model("llama"), plain))


def test_several_adapters_are_summed_and_rounded_once(plain: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", "llama", target_modules=["q_proj"], r=3, use_rslora=True)
    live = model("llama", torch.bfloat16)
    result = merged(live, plain, other)
    name = "model.layers.0.self_attn.q_proj.weight"
    total = live.state_dict()[name].double()
    for folder in (plain, other):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        product = (
            tensors[f"{PREFIX}.lora_B.weight"].double()
            @ tensors[f"{PREFIX}.lora_A.weight"].double()
        )
        total += product * config["lora_alpha"] / config["r"] ** (0.5 if folder == other else 1)
    got = result.tensors[name].read_all()
    assert (got != total.to(torch.bfloat16)).double().mean() < 1e-3, "nearest to the true sum"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA does not add up"),
        (
            {"target_modules": ["k_proj"], "modules_to_save": ["norm"]},
            "more than one adapter replaces it",
        ),
    ],
    ids=["DoRA", "replaced"],
)
def test_adapters_that_do_not_commute_are_refused(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    one = trained(tmp_path / "one", "llama", target_modules=["q_proj"], modules_to_save=["norm"])
    other = trained(tmp_path / "other", "llama", **settings)
    tensors = load_file(other / "adapter_model.safetensors")
    if norm := [name for name in tensors if name.endswith("norm.weight")]:
        tensors[norm[0]] += 1
        save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        merged(model("llama"), one, other)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
        ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}),
        ("llama_bias", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj",
                                                                  "experts.down_proj"]}),
    ],
)  # fmt: skip
def test_a_live_models_state_splits_into_base_and_adapter(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = trained(tmp_path / "adapter", kind, **settings)
    live = PeftModel.from_pretrained(model(kind), folder)
    state = {name: in_memory(name, t, Path("state")) for name, t in live.state_dict().items()}
    base, adapters = split_adapters(state)
    plain = dict(model(kind).state_dict())
    assert base.keys() == plain.keys()
    saved = read_adapter(folder)
    assert adapters.keys() == {"default"}
    own = adapters["default"]
    kept = {name for name in saved.tensors if not re_saved(name)}
    assert kept <= own.keys()
    assert {name for name in own if "lm_head.token_adapter" not in name} == kept
    for name in kept:
        assert torch.equal(own[name].read_all(), saved.tensors[name].read_all())
    result = merge(
        tensors_of(model(kind)) if kind == "tied" else base,
        json.loads(live.config.to_json_string(use_diff=False)),
        [Adapter(folder, saved.config, own)],
    )
    assert_equal(result, by_peft(model(kind), folder))


def re_saved(name: str) -> bool:
    """Base tensors that an adapter file repeats; in a live model they belong to the base."""
    return ".base_layer.weight" in name or (name.endswith(".bias") and "lora_B" not in name)


def test_adapters_in_half_precision_are_read_in_fp32(plain: Path, tmp_path: Path) -> None:
    folder = in_dtype(plain, torch.float16, tmp_path / "half")
    result = merged(model("llama", torch.bfloat16), folder)
    assert_equal(result, by_peft(model("llama", torch.bfloat16), folder))
