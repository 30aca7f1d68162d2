"""What trainers leave in one file or in DCP becomes a model: nested, wrapped, with an adapter that
is not merged, with an optimizer's moments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from launcher.errors import UserError
from tests.helpers.exports import consolidate, make_adapter, merged_by_peft, plan_of, stored
from tests.helpers.sharded import Trained, save_zero

State = dict[str, torch.Tensor]
TARGETS = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture(scope="module")
def adapter(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    return make_adapter(tiny_untied, folder, rank_pattern={"down_proj": 2}, **TARGETS)


@pytest.fixture(scope="module")
def live(tiny_untied: Path, adapter: Path) -> State:
    """The state of the PEFT model that `adapter` was saved from."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    state: State = PeftModel.from_pretrained(model, adapter).state_dict()
    return state


def small_files(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def test_the_state_of_a_peft_model_in_a_model_folder_is_merged(
    tiny_untied: Path, adapter: Path, live: State, tmp_path: Path
) -> None:
    expected = merged_by_peft(tiny_untied, adapter)
    for name in ("pytorch_model.bin", "model.safetensors", "pytorch_model_fsdp.bin"):
        folder = small_files(tiny_untied, tmp_path / name)
        if name.endswith(".bin"):
            torch.save({"module": {f"_orig_mod.{k}": v for k, v in live.items()}}, folder / name)
        else:
            save_file({k: v.clone() for k, v in live.items()}, folder / name)
        with pytest.raises(UserError, match=r"no adapter_config\.json beside it.*--alpha"):
            plan_of(folder)
        consolidate(folder, "--output", tmp_path / "alpha", "--overwrite", "--alpha", 12)
        shutil.copy(adapter / "adapter_config.json", folder)
        consolidate(folder, "--output", tmp_path / "out", "--overwrite")
        for out in ("alpha", "out"):
            found = stored(tmp_path / out)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), out
        with pytest.raises(UserError, match=r"--alpha 3 needs .*adapter_config.json has its"):
            plan_of(folder, alpha=3.0)


def test_a_state_without_a_config_names_its_base(
    tiny_untied: Path, adapter: Path, live: State, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    torch.save({f"net.{name}": each for name, each in live.items()}, tmp_path / "state/model.bin")
    (tmp_path / "state/optimizer.bin").write_bytes(b"")
    with pytest.raises(UserError, match="name its model with --base"):
        plan_of(tmp_path / "state")
    words = tmp_path / "state", "--base", tiny_untied, "--alpha", 12
    consolidate(*words, "--output", tmp_path / "out")
    consolidate(*words, "--output", tmp_path / "adapter", "--adapter-only")
    expected = merged_by_peft(tiny_untied, adapter)
    extracted = merged_by_peft(tiny_untied, tmp_path / "adapter")
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(tensor, extracted[name])


def test_lora_that_is_not_merged_is_never_copied(
    tiny_untied: Path, live: State, tmp_path: Path
) -> None:
    """Under the names of a model that has its own weights for the adapted modules."""
    folder = small_files(tiny_untied, tmp_path / "model")
    lora = {n.removeprefix("base_model.model."): t.clone() for n, t in live.items() if "lora_" in n}
    save_file(stored(tiny_untied) | lora, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"an adapter that is not merged .*lora_.*--alpha"):
        plan_of(folder)
    assert plan_of(folder, alpha=1.0).describe().count("merged (LoRA)") == 1


def test_the_output_of_zero_to_fp32_is_merged(
    ranks: Any, tiny_untied: Path, tmp_path: Path
) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    ranks.run(2, save_zero, tmp_path / "zero", Trained(2, lora=True, base=tiny_untied))
    folder = small_files(tiny_untied, tmp_path / "model")
    convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path / "zero"), str(folder))
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 8, "target_modules": ["q_proj"]}
    settings["base_model_name_or_path"] = str(tiny_untied)
    for place in (folder, tmp_path / "zero"):
        (place / "adapter_config.json").write_text(json.dumps(settings))
    consolidate(folder, "--output", tmp_path / "out")
    consolidate(tmp_path / "zero", "--dtype", "fp32", "--output", tmp_path / "masters")
    found, masters = stored(tmp_path / "out"), stored(tmp_path / "masters")
    assert found.keys() == masters.keys() == stored(tiny_untied).keys()
    assert all(torch.equal(found[name], masters[name].bfloat16()) for name in found)


@pytest.fixture(scope="module")
def full(tiny_untied: Path) -> tuple[State, State]:
    """(the weights, the moments of AdamW by parameter and name)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(9).view(1, -1)).logits.sum().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    moments = {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in named.items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    return {name: each.detach() for name, each in named.items()}, moments


NESTINGS = {
    "flat": lambda state, moments: state | moments,
    "wrapped": lambda state, moments: {f"net.{n}": t for n, t in (state | moments).items()},
    "lightning": lambda state, moments: {
        "state_dict": {f"model.{name}": each for name, each in state.items()},
        "optimizer_states": {"0": moments},
    },
    "policy": lambda state, moments: {"policy": state, "optim": moments},
    "module": lambda state, moments: {"app": {"module": state, "optimizer": moments}},
    "model_state_dict": lambda state, moments: {
        "model_state_dict": {f"_forward_module.{name}": each for name, each in state.items()},
        "optimizer_state_dict": moments,
    },
    "other": lambda state, moments: {"net": state, "optimizer": moments},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_only_the_models_weights_are_taken_from_dcp(
    full: tuple[State, State], nesting: str, tiny_untied: Path, tmp_path: Path
) -> None:
    folder = small_files(tiny_untied, tmp_path / "dcp")
    dcp.save(NESTINGS[nesting](*full), checkpoint_id=folder)
    for where in ({}, {"base": str(tiny_untied)}):
        plan = plan_of(folder, **where)
        found = {tensor.name: tensor for tensor in plan.tensors}
        assert found.keys() == full[0].keys()
        assert all(torch.equal(found[n].read_all(), t.bfloat16()) for n, t in full[0].items())
        left_out = [note for note in plan.notes if "that are not weights" in note]
        assert bool(left_out) == (nesting in ("flat", "wrapped"))


@pytest.mark.parametrize("nesting", ["wrapped", "policy", "model_state_dict"])
def test_only_the_models_weights_are_taken_from_a_torch_file(
    full: tuple[State, State], nesting: str, tiny_untied: Path, tmp_path: Path
) -> None:
    folder = small_files(tiny_untied, tmp_path / "model")
    torch.save(NESTINGS[nesting](*full), folder / "pytorch_model.bin")
    found = {tensor.name: tensor for tensor in plan_of(folder).tensors}
    assert found.keys() == full[0].keys()
    assert all(torch.equal(found[name].read_all(), each) for name, each in full[0].items())


def test_tensors_that_the_class_does_not_have_are_no_weights_of_it(
    full: tuple[State, State], tiny_untied: Path, tmp_path: Path
) -> None:
    value_head = {"v_head.summary.weight": torch.ones(1, 48)}
    copies = {f"ema.{name}": each for name, each in full[0].items()}
    folder = small_files(tiny_untied, tmp_path / "with head")
    dcp.save({"model": full[0] | value_head}, checkpoint_id=folder)
    plan = plan_of(folder)
    assert plan.actions.keys() == full[0].keys()
    assert any("LlamaForCausalLM does not have: v_head" in note for note in plan.notes)
    layer = {"model.layers.2.mlp.up_proj.weight": torch.ones(2, 3)}
    for others, count in ((copies, 21), (layer, 1)):
        folder = small_files(tiny_untied, tmp_path / f"with {count}")
        dcp.save({"model": full[0] | others}, checkpoint_id=folder)
        message = rf"{count} tensor\(s\) that LlamaForCausalLM.*does not have"
        with pytest.raises(UserError, match=message):
            plan_of(folder)
    own = {"model.norm.seen": torch.tensor(3)}
    folder = small_files(tiny_untied, tmp_path / "with a buffer")
    dcp.save({"model": full[0] | own}, checkpoint_id=folder)
    plan = plan_of(folder)
    assert "model.norm.seen" in plan.actions
    assert any("exported with the module that has them: model.norm.seen" in n for n in plan.notes)


def test_an_adapter_of_a_wrapped_model_is_merged(
    tiny_untied: Path, adapter: Path, tmp_path: Path
) -> None:
    """`net.` around the model in PEFT's, and a wrapper around PEFT's."""
    expected = merged_by_peft(tiny_untied, adapter)
    folder = Path(shutil.copytree(adapter, tmp_path / "wrapped"))
    old = "base_model.model."
    renamed = {n.replace(old, f"module.{old}net."): t for n, t in stored(adapter).items()}
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    found = {tensor.name: tensor.read_all() for tensor in plan_of(folder).tensors}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    settings = json.loads((folder / "adapter_config.json").read_text())
    paths = {n.rpartition(".lora_A")[0].removeprefix(old) for n in stored(adapter) if "lora_A" in n}
    settings |= {"target_modules": [f"net.{path}" for path in sorted(paths)]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    consolidate(folder, "--output", tmp_path / "alone", "--adapter-only")
    assert stored(tmp_path / "alone").keys() == stored(adapter).keys()
    extracted = merged_by_peft(tiny_untied, tmp_path / "alone")
    assert all(torch.equal(extracted[name], tensor) for name, tensor in expected.items())


def save_mixed(rank_info: Any, base: Path, folder: Path) -> None:
    """As HF's Trainer under ZeRO-3: the model in bf16, the adapter in fp32."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_batch_size": rank_info.world_size, "bf16": {"enabled": True}}
    settings |= {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    lora = LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora)
    trained = [each for each in wrapped.parameters() if each.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=wrapped, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=settings,
        dist_init_required=False,
    )  # fmt: skip
    for _ in range(2):
        tokens = torch.arange(9).view(1, -1)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    if rank_info.rank == 0:
        wrapped.save_pretrained(folder, state_dict=state)


def test_an_adapter_in_fp32_on_a_model_in_bf16_keeps_its_bits(
    ranks: Any, tiny_untied: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-2"
    ranks.run(2, save_mixed, tiny_untied, folder)
    assert stored(folder)  # in fp32
    assert {tensor.dtype for tensor in stored(folder).values()} == {torch.float32}
    expected = merged_by_peft(tiny_untied, folder)
    consolidate(folder, "--output", tmp_path / "file")
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in stored(folder)}, file, {"format": "pt"})
    consolidate(folder, "--output", tmp_path / "state")
    for out in ("file", "state"):
        found = stored(tmp_path / out)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), out


@pytest.mark.parametrize("place", ["pytorch_model.bin", "dcp"])
def test_the_state_of_another_method_is_refused(
    tiny_untied: Path, tmp_path: Path, place: str
) -> None:
    """It is below the modules of the class, and was taken for a part of them."""
    settings = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    state = get_peft_model(model, settings).state_dict()
    folder = small_files(tiny_untied, tmp_path / "model")
    if place == "dcp":
        plain = {name.removeprefix("base_model.model."): each for name, each in state.items()}
        dcp.save({"model": plain}, checkpoint_id=folder)
    else:
        torch.save(state, folder / place)
    with pytest.raises(UserError, match=r"ia3_l.*peft_type='IA3'.*merge_and_unload"):
        plan_of(folder)


def test_the_base_in_a_state_lacks_the_first_factors_already(
    tiny_untied: Path, tmp_path: Path
) -> None:
    """With or without these beside it: nothing is taken out of the base again."""
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = get_peft_model(model, settings)
    folder = small_files(tiny_untied, tmp_path / "model")
    wrapped.save_pretrained(folder / "pissa_init")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    torch.save(wrapped.state_dict(), folder / "pytorch_model.bin")
    shutil.copy(folder / "pissa_init/adapter_config.json", folder)
    expected = wrapped.merge_and_unload().state_dict()
    for number in range(2):
        consolidate(folder, "--output", tmp_path / "out", "--overwrite")
        for name, tensor in stored(tmp_path / "out").items():  # in bf16, as config.json says
            assert torch.allclose(tensor.float(), expected[name], atol=5e-3), (number, name)
        shutil.rmtree(folder / "pissa_init", ignore_errors=True)


def test_each_adapter_of_a_state_has_its_own_settings(tiny_untied: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    wrapped.add_adapter("other", LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    folder = small_files(tiny_untied, tmp_path / "model")
    torch.save(wrapped.state_dict(), folder / "pytorch_model.bin")
    wrapped.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved/adapter_config.json", folder)
    with pytest.raises(UserError, match=r"no other/adapter_config\.json beside it.*--alpha"):
        plan_of(folder, adapter_name="other")
    (folder / "other").mkdir()
    shutil.copy(tmp_path / "saved/other/adapter_config.json", folder / "other")
    words = ("--adapter-name", "other", "--output", tmp_path / "out", "--dtype", "fp32")
    consolidate(folder, *words)
    wrapped.set_adapter("other")
    expected = wrapped.merge_and_unload(adapter_names=["other"]).state_dict()
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
