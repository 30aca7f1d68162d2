"""What precision=auto and strategy=auto become on given devices."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import Config, store
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.table import RULES, broken_rules
from launcher.run import auto
from launcher.run.auto import Device
from tests.helpers.compose import composed_raw

GB = 10**9
H100 = Device("NVIDIA H100 80GB HBM3", True, True, 80 * GB)
V100 = Device("Tesla V100-SXM2-32GB", True, False, 32 * GB)
CPU = Device("CPU", False, False, 12 * GB)
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of 8 B parameters."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def config_of(**sections: dict[str, Any]) -> Config:
    unchosen = {"strategy": {"name": "auto"}, "precision": {"name": "auto"}}
    return store.build(composed_raw(**{**unchosen, **sections}))


def choose(
    config: Config, device: Device, model: Path, nodes: int = 1, ranks: int = 8,
    resumed: Config | None = None,
) -> tuple[str, str, list[str]]:  # fmt: skip
    """(precision, strategy, lines) of ranks that all have `device`."""
    world = World(nodes, ranks, Machine(gpus=ranks * device.is_gpu))
    devices = [device] * world.size
    choice = auto.choose(config, devices, world, model, resumed)
    assert not auto.is_open(choice.config)
    assert broken_rules(choice.config, world, auto.WORLD_RULES) == []
    return choice.config.precision.name, choice.config.strategy.name, choice.lines


@pytest.mark.parametrize(
    ("devices", "precision", "why"),
    [
        ([H100] * 2, "bf16", "NVIDIA H100"),
        ([H100, V100], "fp16", "Tesla V100-SXM2-32GB does not compute in bf16"),
        ([CPU] * 2, "fp32", "the ranks run on CPU"),
        ([H100, CPU], "fp32", "the ranks run on CPU"),
    ],
)
def test_the_precision_is_one_that_all_ranks_know(
    llama: Path, devices: list[Device], precision: str, why: str
) -> None:
    choice = auto.choose(config_of(), devices, World(1, 2), llama, None)
    assert choice.config.precision.name == precision
    assert choice.lines[0].startswith(f"precision=auto: {precision}, because {why}")


FULL = {"method": {"name": "full"}, "data": {"max_length": 2048}}
LONG = {"data": {"max_length": 4096}}
RECOMPUTED = {**FULL, "training": {"activation_checkpointing": "full"}}


@pytest.mark.parametrize(
    ("sections", "device", "nodes", "ranks", "strategy"),
    [
        (LONG, H100, 1, 8, "ddp"),  # 16 GB of weights and 25 GB of activations
        (LONG, V100, 1, 8, "fsdp"),  # 41 of 32 GB
        (RECOMPUTED, H100, 1, 8, "fsdp"),  # 145 GB, 18 of them a rank
        (RECOMPUTED, H100, 4, 8, "hsdp"),  # a node holds it
        (RECOMPUTED, V100, 4, 4, "fsdp"),  # 145 of 128 GB
        (RECOMPUTED, H100, 8, 1, "fsdp"),  # a node has one rank
    ],
)
def test_the_strategy_is_the_first_that_fits(
    llama: Path, sections: dict[str, Any], device: Device, nodes: int, ranks: int, strategy: str
) -> None:
    _, chosen, lines = choose(config_of(**sections), device, llama, nodes, ranks)
    assert chosen == strategy
    assert f"strategy=auto: {strategy}, because " in lines[1]
    assert " GB of " in lines[1]


@pytest.mark.parametrize(
    ("sections", "memory", "also"),
    [
        (LONG, 80 * GB, ""),
        (LONG, None, ""),
        ({**FULL, "optimizer": {"name": "adafactor"}}, None, ""),
        (FULL, 80 * GB, ", although a complete train state needs about "),  # nothing else is better
    ],
)
def test_one_rank_trains_alone(
    llama: Path, sections: dict[str, Any], memory: int | None, also: str
) -> None:
    device = dataclasses.replace(H100, memory=memory)
    _, chosen, lines = choose(config_of(**sections), device, llama, ranks=1)
    assert chosen == "single"
    said = "strategy=auto: single, because there is one rank"
    assert lines[1].partition(" GB")[0].startswith(said + also)
    assert (lines[1] == said) is (also == "")


def test_what_is_not_known_is_not_replicated(llama: Path, tmp_path: Path) -> None:
    unknown = dataclasses.replace(H100, memory=None)
    assert choose(config_of(), unknown, llama)[1] == "fsdp"
    assert "the size of the model is not known" in choose(config_of(), H100, tmp_path)[2][1]


def test_an_optimizer_that_needs_complete_tensors_gets_them(llama: Path) -> None:
    config = config_of(optimizer={"name": "adafactor"}, method={"name": "full"})
    world = World(1, 8, Machine(gpus=8))
    choice = auto.choose(config, [V100] * 8, world, llama, None)
    assert choice.config.strategy.name == "ddp"
    needs = tuple(rule for rule in RULES if "adafactor" in rule.id)
    assert needs
    assert broken_rules(choice.config, world, needs) == []


def test_a_resumed_run_keeps_the_choices_of_its_checkpoint(llama: Path) -> None:
    trained = store.build(
        composed_raw(strategy={"name": "fsdp", "reshard_after_forward": False},
                     precision={"name": "fp32"})
    )  # fmt: skip
    choice = auto.choose(config_of(), [H100] * 2, World(1, 2), llama, trained)
    assert (choice.config.strategy, choice.config.precision) == (
        trained.strategy, trained.precision,
    )  # fmt: skip
    copied = store.build(composed_raw(strategy={"name": "ddp"}, precision={"name": "bf16"}))
    _, kept, lines = choose(config_of(**FULL), H100, llama, resumed=copied)
    assert kept == "ddp", "kept, and said that it may not fit here"
    said = "because the checkpoint was trained with it, although a complete train state needs"
    assert said in lines[1]
    alone = store.build(composed_raw(strategy={"name": "single"}))
    assert choose(config_of(), H100, llama, resumed=alone)[1] == "ddp", "single has one rank"


@pytest.mark.parametrize(
    ("sections", "ranks", "ways_out"),
    [
        (FULL, 1, "training.activation_checkpointing=full, method=qlora, strategy=fsdp_offload or"),
        (RECOMPUTED, 8, "method=qlora, strategy=fsdp_offload or more ranks; shardway plan"),
        ({**RECOMPUTED, "method": {"name": "qlora"}}, 8, "strategy=fsdp_offload or more ranks;"),
        ({**RECOMPUTED, "optimizer": {"name": "adafactor"}}, 8, "method=qlora or more ranks"),
    ],
)
def test_ways_out_are_those_that_are_not_taken_yet(
    llama: Path, sections: dict[str, Any], ranks: int, ways_out: str
) -> None:
    small = dataclasses.replace(H100, memory=4 * GB)
    assert f" → {ways_out}" in choose(config_of(**sections), small, llama, ranks=ranks)[2][1]


def test_a_refusal_explains_what_nobody_has_typed(llama: Path) -> None:
    config, world = config_of(training={"loss": "liger"}), World(1, 2, Machine(gpus=2, liger=True))
    choice = auto.choose(config, [V100] * 2, world, llama, None)
    problems = broken_rules(choice.config, world, RULES)
    (refused,) = [each for each in problems if "precision=fp16" in each]
    assert choice.explain([refused]) == [refused, choice.lines[0]]
    assert choice.explain(["data.path: no such file"]) == ["data.path: no such file"]


def test_what_is_set_is_kept_and_gives_no_line(llama: Path) -> None:
    config = config_of(strategy={"name": "zero3"}, precision={"name": "pure_bf16"})
    assert choose(config, CPU, llama) == ("pure_bf16", "zero3", [])


def test_fp32_on_gpus_is_called_slow_with_the_override() -> None:
    fp32 = store.build(composed_raw())
    line = auto.warn_about_fp32(fp32, H100)
    assert line is not None
    assert "→ precision=bf16, or training.tf32=true" in line
    assert "precision=fp16" in str(auto.warn_about_fp32(fp32, V100))
    for sections in ({"precision": {"name": "bf16"}}, {"training": {"tf32": True}}):
        assert auto.warn_about_fp32(store.build(composed_raw(**sections)), H100) is None


def test_levers_that_are_off_are_named_with_their_overrides() -> None:
    line = str(auto.unused_levers(store.build(composed_raw())))
    for override in ("data.packing=true", "training.kernels=liger", "training.compile=auto"):
        assert override in line
    assert "activation_checkpointing" not in line
    fast = composed_raw(data={"packing": True}, training={"kernels": "liger"})
    assert auto.unused_levers(store.build(fast)) is None
    zero = composed_raw(strategy={"name": "zero2"}, data={"packing": True})
    assert "compile" not in str(auto.unused_levers(store.build(zero)))
