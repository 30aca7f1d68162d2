"""`shardway plan --search`: short traces agree with whole ones, the roofline with arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import preflight
from launcher.cluster.gpu_specs import spec_named
from launcher.config import Config, store
from launcher.config.compose import compose_command_line
from launcher.config.overrides import key_of
from launcher.config.rules.rule import World
from launcher.errors import UserError
from launcher.memory.estimate import Estimate, Trace
from launcher.memory.planning import Memory, plan_run, plannable_world
from launcher.memory.search import Search
from launcher.memory.target import Target
from launcher.memory.tracers import Request, Tracers
from launcher.run.auto import Device
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


class MadeUp(Tracers):
    """Traces that are made up: a state of 1,000 bytes, on the host if it is offloaded. `tried` gets
    strategy and precision of each."""

    def __init__(self, world: World, tried: list[tuple[str, str]]) -> None:
        super().__init__(world)
        self._tried = tried

    def answer(self, requests: Any) -> Any:
        self._tried += [(r.config.strategy.name, r.config.precision.name) for r in requests]
        return [self._made_up("offload" in r.config.strategy.name) for r in requests]

    def _made_up(self, offloads: bool) -> Trace:
        on_gpu = 10.0 if offloads else 1000.0
        names = ("flops", "written", "kernels", "trained", "elements", "working", "layers")
        amounts = dict.fromkeys(names, 1.0) | {"optimizer": 1.0, "weights": on_gpu}
        amounts |= {"kept": 1.0, "loading": 5.0, "host": 1000.0 - on_gpu}
        amounts |= {"peak1/forward": on_gpu, "peak2/forward": on_gpu}
        return Trace(layers=3, all_layers=3, amounts=amounts, wider=amounts)


def test_offloading_is_tried_where_nothing_else_fits(tmp_path: Path) -> None:
    asked = config(tmp_path, method={"name": "full"})
    world, _ = plannable_world(asked)
    tried: list[tuple[str, str]] = []

    def search(memory: Memory) -> list[str]:
        tried.clear()
        found = Search(asked, (), world, memory, MadeUp(world, tried)).run(H100)
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


@pytest.mark.parametrize(
    ("method", "nodes", "memory"),
    [("full", 1, 2000), ("lora", 8, 500), ("qlora", 64, 2000), ("freeze", 64, 500)],
)
def test_a_launch_accepts_what_a_search_prints(
    method: str, nodes: int, memory: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, with the overrides that were typed: the rules and the model's folder."""
    words = [f"model.name_or_path={tiny}", f"method={method}", "training.max_steps=2"]
    words += ["cluster=slurm", "cluster.gpus_per_node=8", f"cluster.nodes={nodes}"]
    words += [f"training.global_batch_size={16 * nodes}"]

    def composed(*more: str) -> Config:
        monkeypatch.setattr("sys.argv", ["shardway train", *words, *more])
        (found,) = compose_command_line()
        return found

    asked = composed()
    world, _ = plannable_world(asked, Target(device=Device("H100", True, True, memory)))
    typed = [key_of(word) for word in words]
    found = Search(asked, typed, world, Memory(gpu=memory), MadeUp(world, [])).run(H100)
    assert world.size == 8 * nodes
    assert {each.overrides[0].endswith("offload") for each in found} == {memory == 500}
    for overrides in {each.overrides[0]: each.overrides for each in found}.values():
        preflight.check(composed(*overrides))


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
