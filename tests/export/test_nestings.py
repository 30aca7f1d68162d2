"""States with several models: which one is exported is said and can be chosen, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM

from launcher.errors import UserError
from tests.helpers.exports import consolidate, make_adapter, plan_of, stored

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tiny_untied: Path) -> State:
    return {name: tensor + 1 for name, tensor in stored(tiny_untied).items()}


@pytest.fixture(scope="module")
def other(tiny_untied: Path) -> State:
    return {name: tensor - 1 for name, tensor in stored(tiny_untied).items()}


def save(kind: str, state: dict[str, Any], folder: Path) -> Path:
    if kind == "dcp":
        dcp.save(state, checkpoint_id=folder)
        return folder
    folder.mkdir(parents=True)
    if kind == "torch":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    flat = {f"{key}.{name}": tensor for key, each in state.items() for name, tensor in each.items()}
    if kind == "flat":
        save_file(flat, folder / "model.safetensors")
    else:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(flat, storage_writer=writer)
    return folder


@pytest.mark.parametrize(
    ("kind", "taken", "left"),
    [
        ("dcp", "model", "ema"),
        ("dcp", "policy", "reference"),
        ("torch", "student", "teacher"),
        ("torch", "state_dict", "swa"),
        ("flat", "actor", "critic"),
        ("safetensors", "model", "ema"),
    ],
)
def test_the_trained_model_is_taken_and_the_other_one_is_named(
    kind: str,
    taken: str,
    left: str,
    trained: State,
    other: State,
    tiny_untied: Path,
    tmp_path: Path,
) -> None:
    folder = save(kind, {left: other, taken: trained}, tmp_path / "state")
    plan = plan_of(folder, base=str(tiny_untied))
    assert f"under {taken} is taken, not {left} (--model-key {left})" in "\n".join(plan.notes)
    words = folder, "--base", tiny_untied
    consolidate(*words, "--output", tmp_path / "out")
    consolidate(*words, "--output", tmp_path / "other", "--model-key", left)
    for out, expected in (("out", trained), ("other", other)):
        found = stored(tmp_path / out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), out
    with pytest.raises(UserError, match=rf"--model-key ghost: .* → one of .*{taken}"):
        plan_of(folder, base=str(tiny_untied), model_key="ghost")


@pytest.mark.parametrize("kind", ["dcp", "torch"])
@pytest.mark.parametrize("names", [("model", "module"), ("generator", "judge")], ids=str)
def test_two_models_of_equal_rank_are_refused(
    kind: str,
    names: tuple[str, str],
    trained: State,
    other: State,
    tiny_untied: Path,
    tmp_path: Path,
) -> None:
    folder = save(kind, dict(zip(names, (trained, other), strict=True)), tmp_path / "state")
    with pytest.raises(UserError, match=rf"2 models \({names[0]}, {names[1]}\).*--model-key"):
        plan_of(folder, base=str(tiny_untied))
    consolidate(
        *(folder, "--base", tiny_untied, "--output", tmp_path / "out", "--model-key", names[1])
    )
    found = stored(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("kind", ["dcp", "torch"])
def test_what_is_no_model_is_no_choice(
    kind: str, trained: State, tiny_untied: Path, tmp_path: Path
) -> None:
    """The optimizer's state, an average of two tensors, and keys within keys."""
    some = dict(list(trained.items())[:2])
    moments = {"state": {n: {"exp_avg": t} for n, t in trained.items()}, "step": torch.ones(1)}
    state = {"app": {"model": trained, "optimizer": moments}, "module": some, "rng": torch.ones(3)}
    folder = save(kind, state, tmp_path / "state")
    with pytest.raises(UserError, match=r"lacks|differ"):
        plan_of(folder, base=str(tiny_untied), model_key="module")
    plan = plan_of(folder, base=str(tiny_untied))
    assert "under app.model is taken, not module" in "\n".join(plan.notes)
    alone = save(kind, {"generator": trained, "optim": moments}, tmp_path / "alone")
    assert "several models" not in "\n".join(plan_of(alone, base=str(tiny_untied)).notes)


def test_models_by_their_names_in_a_nested_state(
    trained: State, other: State, tiny_untied: Path, tmp_path: Path
) -> None:
    """As Lightning saves a module with several; a tensor beside them is no third."""
    for kind, names in (("dcp", ("policy", "reference")), ("torch", ("generator", "judge"))):
        both = zip(names, (trained, other), strict=True)
        flat = {f"{key}.{name}": tensor for key, state in both for name, tensor in state.items()}
        state = {"state_dict": flat | {"beta.x": torch.ones(1)}}
        folder = save(kind, state, tmp_path / kind)
        where = {"base": str(tiny_untied)}
        if kind == "dcp":
            assert "policy is taken, not state_dict.ref" in "\n".join(
                plan_of(folder, **where).notes
            )
        else:
            with pytest.raises(UserError, match="begin with generator, judge → --model-key gen"):
                plan_of(folder, **where)
        out = tmp_path / f"out-{kind}"
        words = folder, "--base", tiny_untied, "--output", out
        consolidate(*words, "--model-key", names[1])
        assert all(torch.equal(stored(out)[name], tensor) for name, tensor in other.items())


def test_an_adapter_beside_its_base_is_not_left_out(
    trained: State, tiny_untied: Path, tmp_path: Path
) -> None:
    lora = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}
    dcp.save({"model": trained, "lora": lora}, checkpoint_id=tmp_path)
    where = {"base": str(tiny_untied)}
    with pytest.raises(UserError, match=r"an adapter under lora, and the model under model is wi"):
        plan_of(tmp_path, **where)
    assert plan_of(tmp_path, model_key="model", **where).actions


def test_a_state_in_several_files_is_split_by_all_their_names(
    trained: State, other: State, tiny_untied: Path, tmp_path: Path
) -> None:
    """The parts of a state by the names of save_pretrained, and no index: each has one model."""
    for number, (key, state) in enumerate({"actor": trained, "critic": other}.items(), start=1):
        named = {f"{key}.{name}": tensor for name, tensor in state.items()}
        torch.save(named, tmp_path / f"pytorch_model-{number:05d}-of-00002.bin")
    plan = plan_of(tmp_path, base=str(tiny_untied))
    notes = "\n".join(plan.notes)
    assert "has no index: its 2 files are those of one model" in notes
    assert "under actor is taken, not critic" in notes


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_numbered_files_without_an_index_are_one_model(
    extension: str, trained: State, tiny_untied: Path, tmp_path: Path
) -> None:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[extension]
    names = list(trained)
    for number in (1, 2, 3):
        part = {name: trained[name] for name in names[number - 1 :: 3]}
        file = tmp_path / f"{stem}-{number:05d}-of-00003.{extension}"
        save_file(part, file) if extension == "safetensors" else torch.save(part, file)
    consolidate(tmp_path, "--base", tiny_untied, "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    (tmp_path / f"{stem}-00002-of-00003.{extension}").unlink()
    with pytest.raises(UserError, match=rf"lacks {stem}-00002-of-00003\.{extension} .*download"):
        plan_of(tmp_path, base=str(tiny_untied))


def save_actor_and_critic(rank_info: Any, base: Path, folder: Path) -> State:
    """As trainers of PPO save both in one engine, under ZeRO-2; the tied actor's weights."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    actor, critic = (AutoModelForCausalLM.from_pretrained(base, dtype="auto") for _ in range(2))
    both = torch.nn.ModuleDict({"actor": actor, "critic": critic})
    settings = {"train_batch_size": rank_info.world_size, "bf16": {"enabled": True}}
    settings |= {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2}}
    engine, *_ = deepspeed.initialize(
        model=both, optimizer=torch.optim.AdamW(both.parameters(), lr=1e-2), config=settings,
        dist_init_required=False,
    )  # fmt: skip
    tokens = torch.arange(9).view(1, -1)
    loss = actor(input_ids=tokens, labels=tokens).loss + critic(input_ids=tokens).logits.mean()
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(folder))
    return {name: tensor.clone() for name, tensor in actor.state_dict().items()}


def test_the_actor_of_a_deepspeed_checkpoint_is_taken(
    ranks: Any, tiny: Path, tmp_path: Path
) -> None:
    live = ranks.run(2, save_actor_and_critic, tiny, tmp_path / "zero")[0]
    words = tmp_path / "zero", "--base", tiny
    consolidate(*words, "--output", tmp_path / "out")
    consolidate(*words, "--output", tmp_path / "critic", "--model-key", "critic")
    found, critic = stored(tmp_path / "out"), stored(tmp_path / "critic")
    assert found.keys() == critic.keys() == stored(tiny).keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, critic[name]) for name, tensor in found.items())


def test_a_key_that_would_be_ignored_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--model-key ema needs the state of a trainer .* → leave"):
        plan_of(adapter, model_key="ema")
