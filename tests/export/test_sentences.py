"""What cannot be exported is refused with what it is and what to do, whatever file it is in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, TrainingArguments

from launcher.chat.target import find_target
from launcher.errors import UserError
from launcher.export.verify import verify
from tests.helpers.exports import consolidate, make_adapter, plan_of, stored

TASK = {"task_type": "CAUSAL_LM"}
MERGE = r"model\.merge_and_unload\(\)\.save_pretrained"
# Method of PEFT → (its settings, what the message says of its state).
METHODS: dict[str, tuple[Any, str]] = {
    "vera": (peft.VeraConfig(target_modules=["q_proj"], r=4, **TASK), f"'VERA'.*{MERGE}"),
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=3, **TASK), "a trained prompt .* serve"),
    "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK), "a trained prompt .* serve"),
    "adalora": (
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, **TASK),
        f"'ADALORA'.*{MERGE}",
    ),
    "tokens": (peft.TrainableTokensConfig(token_indices=[3], **TASK), "'TRAINABLE_TOKENS'"),
}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *(("vera", "dcp"), ("vera", "config"), ("prompt", "trained"), ("prompt", "model")),
        *(("prefix", "dcp"), ("adalora", "config"), ("adalora", "alpha"), ("tokens", "trained")),
    ],
)
def test_states_of_other_methods_of_peft_are_named(
    method: str, kind: str, tiny_untied: Path, tmp_path: Path
) -> None:
    """In a state with --base, with --alpha, beside adapter_config.json, or beside config.json."""
    settings, message = METHODS[method]
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    wrapped = peft.get_peft_model(model, settings)
    state = wrapped.state_dict()
    if kind == "trained":
        names = {name for name, each in wrapped.named_parameters() if each.requires_grad}
        state = {name: tensor for name, tensor in state.items() if name in names}
    folder, where = tmp_path / "state", {"base": str(tiny_untied)}
    if kind == "model":
        where = {}
        shutil.copytree(tiny_untied, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if kind == "dcp":
        dcp.save({"model": state}, checkpoint_id=folder)
    else:
        folder.mkdir(exist_ok=True)
        torch.save(state, folder / "pytorch_model.bin")
    if kind == "config" and method != "adalora":
        wrapped.save_pretrained(tmp_path / "adapter")
        shutil.copy(tmp_path / "adapter/adapter_config.json", folder)
    for options in ({}, {"alpha": 8.0} if kind == "alpha" else {}):
        with pytest.raises(UserError, match=message):
            plan_of(folder, **where, **options)
    with pytest.raises(UserError, match=message):
        consolidate(
            *(folder, *(["--base", tiny_untied] if where else [])),
            *("--output", tmp_path / "out", "--adapter-only"),
        )


class Module(torch.nn.Linear):
    """A class of a user's program."""


CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "module": (lambda: Module(2, 2), r"Module, which .*→ torch\.save\(model\.state_dict\(\)"),
    "nested module": (lambda: {"model": Module(2, 2)}, r"Module, .*torch\.save\(model\.state_dict"),
    "settings": (
        lambda: {"model": {"a.b": torch.ones(2)}, "args": TrainingArguments("out")},
        r"TrainingArguments, .*no modules, functions or settings",
    ),
    "sparse": (lambda: {"a.b": torch.eye(2).to_sparse()}, r"a sparse tensor → .*to_dense"),
    "rows": (lambda: {"a.b": torch.eye(2).to_sparse_csr()}, r"a sparse tensor → .*to_dense"),
    "quantized": (
        lambda: {"a.b": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        "a quantized tensor → .*dequantize",
    ),
    "meta": (lambda: {"a.b": torch.ones(2, device="meta")}, "a tensor without values"),
    "negated": (lambda: {"a.b": torch._neg_view(torch.ones(2))}, "negated .*resolve_neg"),
    "list": (lambda: [torch.ones(2)], r"contains a list .*→ torch\.save"),
    "tensor": (lambda: torch.ones(2), r"contains a single tensor .*→ torch\.save"),
    "arrays": (lambda: {"a.b": torch.ones(2).numpy()}, r"no tensors by name .*→ torch\.save"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_state_dict_says_how_to_save_one(
    content: str, tiny_untied: Path, tmp_path: Path
) -> None:
    make, message = CONTENTS[content]
    torch.save(make(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, base=str(tiny_untied))


def test_a_program_of_torchscript_is_named(tiny_untied: Path, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(UserError, match=r"bin is a program of TorchScript .*→ torch\.save"):
        plan_of(tmp_path, base=str(tiny_untied))


def test_verify_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    consolidate(tiny, "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"base is not a folder → the folder that shardway"):
        verify(tmp_path / "base")
    with pytest.raises(UserError, match=r"no consolidation_manifest\.json.*→ shardway consol"):
        verify(tiny)
    added = shutil.copy(tiny / "model.safetensors", tmp_path / "out/more.safetensors")
    with pytest.raises(UserError, match=r"more\.safetensors, not written with it → move it"):
        verify(tmp_path / "out")
    Path(added).unlink()
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json has 2 bytes .*→ the same export once more"):
        verify(tmp_path / "out")


def test_chat_names_weights_without_a_config(tiny_untied: Path, tmp_path: Path) -> None:
    torch.save(stored(tiny_untied), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights and no config\.json.*--base MODEL --output DIR"):
        find_target(tmp_path)


def test_the_names_of_another_program_are_told_from_a_wrong_config(
    tiny_untied: Path, tmp_path: Path
) -> None:
    """torchtitan names the modules of Llama as Meta does."""
    native = {"model.embed_tokens": "tok_embeddings", "model.layers": "layers", "lm_head": "output"}
    renamed = {
        name.replace(old, new, 1): tensor
        for name, tensor in stored(tiny_untied).items()
        for old, new in native.items()
        if name.startswith(old)
    }
    for state, message in (
        (renamed, r"has layers\.0\..*→ the names of Hugging Face: torchtitan has .*convert_to_hf"),
        (
            {"net.0.weight": torch.ones(2)},
            "has net.*→ the config it was trained with, or, if anoth",
        ),
        ({"model.norm.weight": torch.ones(48)}, "lacks .* → all files of the checkpoint, or the"),
    ):
        shutil.rmtree(tmp_path / "dcp", ignore_errors=True)
        dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp")
        with pytest.raises(UserError, match=message):
            plan_of(tmp_path / "dcp", base=str(tiny_untied))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_of_a_model_is_a_model(sharded: bool, tiny_untied: Path, tmp_path: Path) -> None:
    """`save_pretrained(variant=…)` writes model.fp16-00001-of-… and an index of another name."""
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    size = "30KB" if sharded else "5GB"
    model.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=size)
    consolidate(tmp_path / "model", "--output", tmp_path / "out")
    assert stored(tmp_path / "out").keys() == stored(tiny_untied).keys()
    assert not [each for each in (tmp_path / "out").iterdir() if "index" in each.name]


def test_a_value_head_is_left_out_with_a_note(tiny_untied: Path, tmp_path: Path) -> None:
    """vLLM refuses tensors that it does not know."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_untied, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    head = {"v_head.summary.weight": torch.ones(1, 48), "v_head.summary.bias": torch.ones(1)}
    torch.save(stored(tiny_untied) | head, folder / "pytorch_model.bin")
    for plan in (
        plan_of(folder),
        plan_of(make_adapter(tiny_untied, tmp_path / "a"), base=str(folder)),
    ):
        assert plan.actions.keys() == stored(tiny_untied).keys()
        assert "left out 2 entries that LlamaForCausalLM does not have" in "\n".join(plan.notes)
