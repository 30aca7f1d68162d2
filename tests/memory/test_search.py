"""`shardway plan --search`: short traces agree with whole ones, the roofline with arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cluster.gpu_specs import spec_named
from launcher.config import Config, store
from launcher.config.rules.rule import World
from launcher.errors import UserError
from launcher.memory import load_and_save, zero
from launcher.memory.dry_run import fake_model
from launcher.memory.estimate import Amounts, Estimate, Trace
from launcher.memory.planning import Memory, plan_run, plannable_world
from launcher.memory.roofline import step_time
from launcher.memory.search import Search
from launcher.memory.trace import cut_layers, repetition
from launcher.memory.tracers import Request, Tracers
from launcher.memory.work import flops_of
from tests.helpers.compose import composed_raw

RANKS, LAYERS = 4, 7
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000,
    "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0],
}  # fmt: skip
MODELS = {"llama": LLAMA, "experts": EXPERTS}
H100 = spec_named("H100")


def config(folder: Path, model: str = "llama", **changes: dict[str, Any]) -> Config:
    file = folder / "config.json"
    file.write_text(json.dumps(MODELS[model]))
    sections: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(folder)},
        "data": {"max_length": 256},
        "training": {"global_batch_size": 8 * RANKS},
        "precision": {"name": "bf16"},
        "cluster": {"nproc_per_node": RANKS},
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return store.build(composed_raw(**sections))


@pytest.fixture(scope="module")
def tracers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracers]:
    """Processes that trace for all tests of this file."""
    world, _ = plannable_world(config(tmp_path_factory.mktemp("model")))
    with Tracers(world) as started:
        yield started


def search_of(asked: Config, tracers: Tracers, *typed: str) -> Search:
    world, _ = plannable_world(asked)
    return Search(asked, typed, world, Memory(gpu=10**12), tracers)


def whole(asked: Config, tracers: Tracers) -> Trace:
    """Without leaving out a layer."""
    (found,) = tracers.answer([Request(config=asked, more=0, min_layers=10**6)])
    assert isinstance(found, Trace)
    assert found.layers == found.all_layers == LAYERS
    return found


@pytest.mark.parametrize(
    ("model", "method", "strategy"),
    [
        ("llama", "full", "fsdp"),
        pytest.param("llama", "lora", "ddp", marks=pytest.mark.whole),
        pytest.param("llama", "full", "zero2", marks=pytest.mark.whole),
        pytest.param("llama", "qlora", "fsdp", marks=pytest.mark.whole),
        pytest.param("llama", "lora", "zero3", marks=pytest.mark.whole),
        pytest.param("experts", "full", "fsdp", marks=pytest.mark.whole),
        pytest.param("llama", "freeze", "hsdp", marks=pytest.mark.whole),
    ],
)
def test_a_search_finds_the_memory_of_whole_dry_runs(
    model: str, method: str, strategy: str, tracers: Tracers, tmp_path: Path
) -> None:
    asked = config(tmp_path, model, method={"name": method}, strategy={"name": strategy})
    search = search_of(asked, tracers, "strategy", "precision")
    found = {tuple(each.overrides): each for each in search.run(H100)}
    assert search.notes == []
    choices = ["off", "2", "full"] if method != "freeze" else ["off", "full"]
    assert len(found) == 4 * len(choices)  # rows, recomputation
    for recompute, rows in (("off", 8), (choices[-2], 4)):
        settings = {"micro_batch_size": rows, "activation_checkpointing": recompute}
        training = dataclasses.replace(asked.training, **settings)  # type: ignore[arg-type]
        exact = whole(dataclasses.replace(asked, training=training), tracers).amounts
        guess = found[tuple(f"training.{key}={value}" for key, value in settings.items())]
        peak = Estimate(amounts=exact, accumulates=rows < 8).peak
        assert guess.peak == pytest.approx(peak, rel=0.02)
        assert guess.weights + guess.optimizer == pytest.approx(
            exact["weights"] + exact["optimizer"], rel=0.001
        )
        assert guess.activations == pytest.approx(exact["kept"], rel=0.02)


@pytest.mark.whole
def test_other_strategies_are_computed_from_one(tracers: Tracers, tmp_path: Path) -> None:
    asked = config(tmp_path, method={"name": "full"})
    typed = ("precision", "training.activation_checkpointing")
    found = search_of(asked, tracers, *typed).run(H100)
    speeds = [each.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True)
    names = {each.overrides[0] for each in found}
    assert names == {f"strategy={name}" for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")}
    training = dataclasses.replace(asked.training, micro_batch_size=4)
    strategy = store.build(composed_raw(strategy={"name": "ddp"})).strategy
    exact = whole(dataclasses.replace(asked, strategy=strategy, training=training), tracers)
    (guess,) = (e for e in found if e.overrides == ["strategy=ddp", "training.micro_batch_size=4"])
    peak = Estimate(amounts=exact.amounts, accumulates=True).peak
    assert guess.peak == pytest.approx(peak, rel=0.03)


def test_offloading_is_tried_where_nothing_else_fits(tmp_path: Path) -> None:
    """With traces that are made up: a state of 1,000 bytes, on the host if it is offloaded."""
    asked = config(tmp_path, method={"name": "full"})
    world, _ = plannable_world(asked)
    tried: list[tuple[str, str]] = []

    class MadeUp(Tracers):
        def answer(self, requests: Any) -> Any:
            tried.extend((r.config.strategy.name, r.config.precision.name) for r in requests)
            return [self._made_up("offload" in r.config.strategy.name) for r in requests]

        def _made_up(self, offloads: bool) -> Trace:
            on_gpu = 10.0 if offloads else 1000.0
            names = ("flops", "written", "kernels", "trained", "elements", "working", "layers")
            amounts = dict.fromkeys(names, 1.0) | {"optimizer": 1.0, "weights": on_gpu}
            amounts |= {"kept": 1.0, "loading": 5.0, "host": 1000.0 - on_gpu}
            amounts |= {"peak1/forward": on_gpu, "peak2/forward": on_gpu}
            return Trace(layers=3, all_layers=3, amounts=amounts, wider=amounts)

    def search(memory: Memory) -> list[str]:
        tried.clear()
        found = Search(asked, (), world, memory, MadeUp(world)).run(H100)
        return sorted({each.overrides[0] for each in found})

    assert search(Memory(gpu=2000)) == [
        f"strategy={name}" for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    ]
    assert {precision for _, precision in tried} == {"bf16"}
    offloaded = [f"strategy={name}_offload" for name in ("fsdp", "zero2", "zero3")]
    assert search(Memory(gpu=500)) == offloaded
    assert ("fsdp", "pure_bf16") in tried
    assert search(Memory(gpu=500, host=RANKS * 1000 - 100)) == []
    assert ("zero3_offload", "pure_bf16") not in tried  # refused by a rule


def test_a_model_that_no_strategy_can_trace_is_refused_once(tmp_path: Path) -> None:
    asked = config(tmp_path, method={"name": "full"})
    world, _ = plannable_world(asked)

    class Refusing(Tracers):
        def answer(self, requests: Any) -> Any:
            return [UserError("no causal language model") for _ in requests]

    search = Search(asked, (), world, Memory(gpu=10**12), Refusing(world))
    with pytest.raises(UserError, match=r"^no causal language model$"):
        search.run(H100)


def test_a_search_reports_rules_that_refuse_everything(tmp_path: Path, tracers: Tracers) -> None:
    asked = config(tmp_path, method={"name": "lora", "dora": True, "pissa": True})
    with pytest.raises(store.ConfigError, match="pissa-without-dora"):
        search_of(asked, tracers, "strategy").run(H100)
    with pytest.raises(store.ConfigError, match="pissa-without-dora") as refused:
        search_of(asked, tracers).run(H100)
    assert "single-is-one-rank" not in str(refused.value), "nobody has typed strategy=single"


@pytest.mark.parametrize(
    ("kinds", "alone", "period"),
    [("aaaaaaaa", 0, 1), ("baaaaaaa", 1, 1), ("abababab", 0, 2), ("cabababa", 1, 2), ("abc", 0, 3)],
)
def test_a_repetition_of_layers_is_found(kinds: str, alone: int, period: int) -> None:
    assert repetition(kinds) == (alone, period)


@pytest.mark.parametrize(
    ("distance", "kept", "keeps_all"),
    [(0, 0, False), (10**9, 0, True), (900_000, 2, False), (255_000, 0, False)],
)
def test_zero3_keeps_the_layers_that_are_used_again_soon(
    distance: int, kept: int, keeps_all: bool, tmp_path: Path
) -> None:
    """A layer has 185,000 elements, the head 128,000: it and the layers behind are used twice."""
    extra = {"zero_optimization": {"stage3_max_reuse_distance": distance}}
    asked = config(tmp_path, strategy={"name": "zero3", "extra": extra})
    built = fake_model(asked)
    assert zero.layers_kept_gathered(built, asked) == kept
    assert zero.keeps_all_gathered(built, asked) is keeps_all
    assert cut_layers(built, asked, more=0, min_layers=1) == (LAYERS, max(3, 2 + kept))
    assert zero.without_prefetch(asked).strategy.prefetch_bucket_size == 0  # type: ignore[attr-defined]
    other = dataclasses.replace(asked, strategy=config(tmp_path).strategy)
    assert zero.without_prefetch(other) == other
    assert zero.layers_kept_gathered(fake_model(other), other) == 0


@pytest.mark.parametrize(
    ("bucket", "live", "distance", "most"),
    [
        (1, 500_000, 0, 500_000 + 128 * 352),  # up to the limit, and the weight that reaches it
        (1, 10**9, 0, 7 * 184_576 + 2 * 128_000 + 128),  # the whole model
        (0, 500_000, 0, 0),
        (1, 500_000, 10**9, 0),  # it keeps everything
    ],
)
def test_zero3_gathers_ahead_up_to_a_limit(
    bucket: int, live: int, distance: int, most: int, tmp_path: Path
) -> None:
    limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": distance}
    options = {"prefetch_bucket_size": bucket, "extra": {"zero_optimization": limits}}
    asked = config(tmp_path, strategy={"name": "zero3", **options})
    assert zero.most_gathered(fake_model(asked), asked) == most


BUCKET = {"reduce_bucket_size": 460_000}  # elements: the gradients of two and a half layers


@pytest.mark.parametrize(
    ("method", "strategy", "layers"),
    [("full", "zero2", 3), ("full", "zero3", 3), ("lora", "zero2", 0), ("full", "fsdp", 0)],
)
def test_traces_have_the_layers_that_fill_a_bucket(
    method: str, strategy: str, layers: int, tmp_path: Path
) -> None:
    options = BUCKET if strategy.startswith("zero") else {}
    asked = config(tmp_path, method={"name": method}, strategy={"name": strategy, **options})
    built = fake_model(asked)
    assert zero.layers_in_a_bucket(built, asked) == layers
    if strategy == "zero2":
        assert cut_layers(built, asked, more=0, min_layers=1) == (LAYERS, max(3, 2 + layers))


def test_a_search_counts_loading_and_the_first_bucket(tmp_path: Path) -> None:
    """With short rows on many ranks, zero2 needs most while it loads: the model in fp32."""
    typed = {"activation_checkpointing": "full", "micro_batch_size": 1, "global_batch_size": 128}
    zero2 = {"name": "zero2", "reduce_bucket_size": 190_000}
    asked = config(tmp_path, method={"name": "full"}, strategy=zero2, data={"max_length": 8},
                   training=typed, cluster={"nproc_per_node": 64})  # fmt: skip
    world, _ = plannable_world(asked)
    words = ("strategy", "precision", *(f"training.{key}" for key in typed))
    with Tracers(world) as started:
        (found,) = Search(asked, words, world, Memory(gpu=10**12), started).run(H100)
    exact = plan_run(asked)
    assert found.phase == exact.phase == "loading"
    assert found.peak == pytest.approx(exact.peak, rel=0.02)


@pytest.mark.whole
def test_a_search_counts_what_zero3_gathers_ahead(tracers: Tracers, tmp_path: Path) -> None:
    """A third of the weights, with a first step that records their order."""
    limits = {"stage3_max_live_parameters": 500_000, "stage3_max_reuse_distance": 300_000}
    zero = {"name": "zero3", "persistence_threshold": 0, "extra": {"zero_optimization": limits}}
    recomputed = {"activation_checkpointing": "full", "micro_batch_size": 1}
    asked = config(tmp_path, method={"name": "full"}, strategy=zero, data={"max_length": 32},
                   training=recomputed)  # fmt: skip
    typed = ("strategy", "precision", *(f"training.{key}" for key in recomputed))
    (found,) = search_of(asked, tracers, *typed).run(H100)
    assert found.peak == pytest.approx(plan_run(asked).peak, rel=0.03)


def test_layers_are_cut_behind_those_that_differ(tmp_path: Path) -> None:
    asked = config(tmp_path, "experts")
    assert cut_layers(fake_model(asked), asked, more=0, min_layers=1) == (LAYERS, 4)
    assert cut_layers(fake_model(asked), asked, more=1, min_layers=5) == (LAYERS, 6)


@pytest.mark.parametrize("model", ["llama", "experts"])
def test_models_are_read_in_slices_as_far_as_their_config_tells(model: str, tmp_path: Path) -> None:
    asked = config(tmp_path, model, method={"name": "full"})
    built = fake_model(asked)
    assert not load_and_save.reads_whole_model(asked, built)
    elements = sum(parameter.numel() for parameter in built.parameters())
    assert load_and_save.whole_model_bytes(asked, built) == 4 * elements  # masters
    built.requires_grad_(False)
    assert load_and_save.whole_model_bytes(asked, built) == 2 * elements


def test_operations_are_those_of_matrix_products_and_causal_attention() -> None:
    aten = torch.ops.aten
    left, right = torch.empty(3, 5), torch.empty(5, 7)
    assert flops_of(aten.mm.default, (left, right)) == 2 * 3 * 5 * 7
    assert flops_of(aten.addmm.default, (torch.empty(7), left, right)) == 2 * 3 * 5 * 7
    assert flops_of(aten.add.Tensor, (left, left)) == 0
    heads = torch.empty(2, 4, 16, 8)  # rows, heads, length, size
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    assert flops_of(attention.default, (heads,) * 3) == 4 * 2 * 4 * (16 * 16 / 2) * 8
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert flops_of(backward.default, (heads,) * 4) == 10 * 2 * 4 * (16 * 16 / 2) * 8


AMOUNTS: Amounts = {
    "flops": 1e15, "written": 1e11, "kernels": 5e3, "trained": 8e9, "elements": 8e9,
    "working": 16e9, "optimizer": 64e9,
}  # fmt: skip


def test_the_slower_of_gpu_and_network_counts(tmp_path: Path) -> None:
    def seconds(name: str, nodes: int = 1, **amounts: float) -> Any:
        asked = config(tmp_path, method={"name": "full"}, strategy={"name": name})
        return step_time(asked, World(nodes, RANKS), AMOUNTS | amounts, H100)

    one = seconds("fsdp")
    assert one.compute == pytest.approx(8 * (1e15 / 643.11e12 + 2e11 / 2.68e12))
    assert one.network == pytest.approx(8 * (2 * 16e9 + 32e9) * 0.75 / 315e9)
    assert one.total == one.compute + one.optimizer
    assert seconds("fsdp", flops=1e12, written=1e9).total == pytest.approx(
        one.network + one.optimizer
    )
    assert seconds("fsdp", kernels=1e6).compute == pytest.approx(8 * 10)
    many = seconds("fsdp", nodes=8)  # one micro-batch
    assert seconds("ddp").network < one.network < 8 * many.network
    few = {"trained": 1e8}  # of an adapter
    assert seconds("hsdp", nodes=8, **few).network < seconds("fsdp", nodes=8, **few).network
    assert seconds("fsdp_offload").total > one.total
    assert seconds("zero1").network < seconds("zero2").network < seconds("zero3").network
