"""Fused adapters of experts compute the same as PEFT's layers, and remain PEFT layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.method.expert_lora import FusedExpertLora, fuse_experts
from launcher.method.lora import Lora
from launcher.method.summary import describe_parameters
from launcher.model.peft import LoraLayer, ParamWrapper
from tests.helpers import exports
from tests.helpers.sparse_models import DIMS, FAMILIES, make_sparse

IDS = torch.arange(3, 3 + 48).view(2, 24)
FUSED = [family for family in FAMILIES if family != "llama4_text"]


def adapted(family: str, **options: Any) -> tuple[Lora, Any]:
    """A model with a nonzero adapter, in PEFT's own layers, and its method."""
    method = Lora(LoraConfig(name="lora", **{"rank": 4, **options}))
    model = method.prepare(make_sparse(family), 3)
    draw = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.05, generator=draw)
    return method, model.train()


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def stacks(model: nn.Module) -> list[FusedExpertLora]:
    return [module for module in model.modules() if isinstance(module, FusedExpertLora)]


@pytest.mark.parametrize("family", FUSED)
def test_gradients_equal_pefts(family: str) -> None:
    _, ours = adapted(family, target_router=family == "phimoe")
    theirs = copy.deepcopy(ours.eval())  # some routers add noise in training
    assert fuse_experts(ours) is None
    assert len(stacks(ours)) == 4
    found, expected = step(ours), step(theirs)
    assert found.keys() == expected.keys() >= trained(ours).keys(), "also where no token came"
    apart = {name: (found[name] - gradient).norm() for name, gradient in expected.items()}
    sizes = {name: gradient.norm() for name, gradient in expected.items()}
    assert torch.stack([*apart.values()]).norm() <= 1e-6 * torch.stack([*sizes.values()]).norm()
    assert all(apart[name] <= 4e-6 * size for name, size in sizes.items()), "each one"


@pytest.mark.parametrize("rank", [4, 8])
def test_bf16_is_as_exact_as_peft(rank: int) -> None:
    _, exact = adapted("qwen3_moe", rank=rank)
    ours = copy.deepcopy(exact).bfloat16()
    theirs = copy.deepcopy(ours)
    fuse_experts(ours)
    expected, found, peft_s = step(exact), step(ours), step(theirs)

    def apart(result: dict[str, torch.Tensor]) -> float:
        pairs = [(result[name].float(), value) for name, value in expected.items()]
        return float(sum((a - b).norm() / b.norm() for a, b in pairs)) / len(pairs)

    assert apart(found) <= 1.15 * apart(peft_s)


def test_an_expert_without_tokens_gets_zeros() -> None:
    _, model = adapted("mixtral")
    fuse_experts(model)
    router = model.base_model.model.model.layers[0].mlp.gate
    router.weight.data.zero_()
    router.weight.data[:2] = model.base_model.model.model.embed_tokens.weight.abs().mean()
    gradients = step(model)
    (name,) = (n for n in gradients if "layers.0.mlp.experts.lora_A" in n)
    per_expert = gradients[name].view(6, -1).abs().sum(1)
    assert (per_expert == 0).any()
    assert (per_expert > 0).any()


class Made(TorchDispatchMode):
    """Records the largest tensor that is created."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        here = {each.untyped_storage().data_ptr() for each in args if torch.is_tensor(each)}
        if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in here:
            self.largest = max(self.largest, made.numel())
        return made


def test_no_copy_of_the_experts_is_made() -> None:
    """Neither in forward nor in backward; the weights of one stack are the largest tensors."""
    counts = {}
    for kind in ("peft", "ours"):
        _, model = adapted("qwen3_moe", rank=1)
        if kind == "ours":
            fuse_experts(model)
        with Made() as made:
            model(input_ids=IDS[:1, :4]).logits.sum().backward()
        counts[kind] = made.largest
    stack = 6 * 48 * 48
    assert counts["ours"] < stack <= counts["peft"]


def test_inputs_of_adapters_are_not_kept_for_backward() -> None:
    kept: dict[str, int] = {}
    for kind in ("without", "with"):
        targets = ["q_proj"] if kind == "without" else ["q_proj", "gate_up_proj", "down_proj"]
        _, model = adapted("qwen3_moe", target_modules=targets)
        fuse_experts(model)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor._base, nn.Parameter) and not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=IDS).logits
        kept[kind] = sum(sizes.values())
        del logits
    rows = 2 * 48  # pairs of a token and an expert
    inputs = 2 * rows * (48 + 24) * 4  # of the adapters of two layers
    assert kept["with"] - kept["without"] < inputs


def test_saving_merging_disabling_and_loading_still_work(tmp_path: Path) -> None:
    method, model = adapted("qwen2_moe", target_router=True)
    plain = copy.deepcopy(model).eval()
    fuse_experts(model.eval())
    assert list(model.state_dict()) == list(plain.state_dict())
    before = model(input_ids=IDS).logits
    with model.disable_adapter(), plain.disable_adapter():
        off = model(input_ids=IDS).logits
        torch.testing.assert_close(off, plain(input_ids=IDS).logits)
    assert not torch.allclose(off, before)
    method.write(model, trained(model), tmp_path / "adapter")
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(make_sparse("qwen2_moe"), str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_trained_further(family: str, tmp_path: Path) -> None:
    """Its modules are those of the first training, as PEFT loads them, too."""
    method, model = adapted(family, dropout=0.0 if family == "llama4_text" else 0.25)
    method.write(model, trained(model), tmp_path / "adapter")
    again = Lora(LoraConfig(name="lora", adapter=str(tmp_path / "adapter")))
    found = again.prepare(make_sparse(family), 5)
    assert [type(module) for module in found.modules()] == [
        nn.Identity if type(module) is nn.Dropout else type(module) for module in model.modules()
    ]
    for name, value in trained(model).items():
        assert torch.equal(trained(found)[name], value)
    loaded = peft.PeftModel.from_pretrained(make_sparse(family), str(tmp_path / "adapter"))
    torch.testing.assert_close(
        loaded.eval()(input_ids=IDS).logits, found.eval()(input_ids=IDS).logits
    )


def test_dropout_changes_the_inputs_of_adapters_alone() -> None:
    _, model = adapted("gpt_oss", dropout=0.5)
    assert fuse_experts(model) is None
    for layer in stacks(model):
        for name, module in layer.lora_dropout.items():
            assert isinstance(module, nn.Dropout)
            assert name == "default"
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(first, second)
    first.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_adapts_experts_and_no_router(family: str) -> None:
    for target_router in (False, True):
        _, model = adapted(family, target_router=target_router)
        layer = model.base_model.model.model.layers[-1]
        block = layer.feed_forward if family == "llama4_text" else layer.mlp
        router = block.gate if hasattr(block, "gate") else block.router
        adapters = [name for name, _ in router.named_parameters() if "lora_" in name]
        assert bool(adapters) == target_router
        experts = [m for m in block.experts.modules() if isinstance(m, ParamWrapper)]
        assert [wrapper.parameter_name for wrapper in experts] == ["down_proj", "gate_up_proj"]
        assert all(wrapper.r == {"default": 4} for wrapper in experts)
        text = describe_parameters(model, torch.float32, torch.bfloat16)
        rows = {" ".join(line.split()[:4]) for line in text.splitlines()}
        assert any(row.startswith("adapter of experts trained") for row in rows)
        assert any(row.startswith("experts frozen") for row in rows)
        assert any(row.startswith("router frozen") for row in rows)
        assert any(row.startswith("adapter of router") for row in rows) == target_router


def test_names_select_parts() -> None:
    _, model = adapted("qwen2_moe", target_modules=["q_proj", "experts.down_proj"])
    assert model.base_model.targeted_parameter_names == [
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)
    ]
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {
        "q_proj"
    }


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3_moe", {"dora": True}, "method.dora=true with adapters of experts"),
        ("qwen3_moe", {"pissa": True}, "method.pissa=true with adapters of experts"),
        ("mixtral", {"target_modules": ["gate"]}, "gate is the router of experts"),
        ("mixtral", {"target_modules": ["w1"]}, "no module is named w1; .* has down_proj, gate_up"),
        ("llama4_text", {"dropout": 0.1}, "method.dropout=0.1 with adapters of experts"),
    ],
)
def test_what_does_not_apply_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(family, **options)


def test_a_model_without_router_has_none_to_adapt(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(UserError, match="has no router of experts"):
        Lora(LoraConfig(name="lora", target_router=True)).prepare(model, 3)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "phimoe"])
def test_consolidating_gives_the_trained_model(family: str, tmp_path: Path) -> None:
    method, model = adapted(family, target_router=family != "phimoe")
    fuse_experts(model.eval())
    method.write(model, trained(model), tmp_path / "adapter")
    make_sparse(family).save_pretrained(tmp_path / "base")
    exports.consolidate(
        tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "export"
    )
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(
        merged(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
    )


def dense_and_sparse() -> Any:
    """A model whose first layer has an MLP and whose second one has experts and a shared expert;
    PEFT renames the linear layers of both."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3", **DIMS | {"num_key_value_heads": 4}, n_routed_experts=6, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 9.0}},
        {"target_modules": ["mlp.down_proj", "mlp.gate_proj"]},  # PEFT takes them for experts
        {  # the first pattern that matches counts, and PEFT sorts them when it writes
            "target_modules": ["mlp.down_proj", "experts.down_proj", "o_proj"],
            "rank_pattern": {"mlp.down_proj": 2, "experts.down_proj": 3},
            "alpha_pattern": {"o_proj": 7.0, "mlp.down_proj": 1.0, ".*_proj": 5.0},
        },
    ],
    ids=["pattern", "no stacks", "overlapping"],
)
def test_a_written_adapter_has_the_ranks_and_scales_of_training(
    options: dict[str, Any], tmp_path: Path
) -> None:
    method = Lora(LoraConfig(name="lora", **{"rank": 4, **options}))
    model = method.prepare(dense_and_sparse(), 3).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.05)
    method.write(model, trained(model), tmp_path / "adapter")
    expected = model(input_ids=IDS).logits

    loaded = peft.PeftModel.from_pretrained(dense_and_sparse(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected)
    again = Lora(LoraConfig(name="lora", adapter=str(tmp_path / "adapter")))
    further = again.prepare(dense_and_sparse(), 3).eval()
    torch.testing.assert_close(further(input_ids=IDS).logits, expected)
    again.write(further, trained(further), tmp_path / "again")
    dense_and_sparse().save_pretrained(tmp_path / "base")
    exports.consolidate(
        tmp_path / "base", "--adapter", tmp_path / "again", "--output", tmp_path / "export"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_overlapping_patterns_of_a_dense_model_keep_their_order(tiny: Path, tmp_path: Path) -> None:
    """The scale of a file that is read is that of training."""
    method = Lora(
        LoraConfig(name="lora", rank=4, alpha=8, alpha_pattern={"q_proj": 1, ".*proj": 3})
    )
    model = method.prepare(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), 3)
    method.write(model, trained(model), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    scales = [
        {name: m.scaling for name, m in each.named_modules() if isinstance(m, LoraLayer)}
        for each in (model, loaded)
    ]
    assert scales[0] == scales[1]
    assert {scale["default"] for scale in scales[0].values()} == {1 / 4, 3 / 4}
