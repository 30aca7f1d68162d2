"""Every rule of the table breaks, says so with a fix, and the fix mends it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import Config, checks, store
from launcher.config.checks import World
from launcher.model.fetch import MODELS
from tests.config.test_schema import composed

ONE = World(nodes=1, nproc_per_node=1, gpus=0)
TWO = World(nodes=1, nproc_per_node=2, gpus=0)
FOUR = World(nodes=1, nproc_per_node=4, gpus=0)


@pytest.fixture(autouse=True)
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ADAPTER`, of rank 4, where the rules look."""
    (tmp_path / "work/ADAPTER").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    Path("ADAPTER/adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    Path("ADAPTER/adapter_model.safetensors").touch()


@pytest.fixture
def good(tiny: Path, rows_file: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": {"name_or_path": str(tiny)},
        "data": {"path": str(rows_file)},
        "training": {"epochs": 1, "global_batch_size": 8, "micro_batch_size": 2},
    }


def build(good: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> Config:
    merged = {s: {**good.get(s, {}), **changes.get(s, {})} for s in {**good, **changes}}
    run_dir = merged.pop("run_dir", {}).get("path")
    resume = merged.pop("resume", {}).get("path", "none")
    return store.build({**composed(**merged), "run_dir": run_dir, "resume": resume})


def broken_ids(config: Config, world: World) -> set[str]:
    return {line.rpartition("[")[2].rstrip("]") for line in checks.broken_rules(config, world)}


EVALUATED: dict[str, Any] = {"training": {"eval_steps": 2}, "data": {"eval_rows": 2}}

# rule → (what breaks it, on which ranks, what mends it)
CASES: dict[str, tuple[dict[str, Any], World, dict[str, Any]]] = {
    "length-of-training": ({"training": {"max_steps": 5}}, ONE, {"training": {"max_steps": None}}),
    "batch-divides": (
        {"training": {"global_batch_size": 7}}, TWO, {"training": {"global_batch_size": 8}},
    ),
    "single-is-one-rank": (
        {"strategy": {"name": "single"}}, TWO, {"strategy": {"name": "fsdp"}},
    ),
    "hsdp-groups": (
        {"strategy": {"name": "hsdp", "shard_size": 3}}, FOUR,
        {"strategy": {"name": "hsdp", "shard_size": 4}},
    ),
    "one-machine": ({"cluster": {"nodes": 2}}, ONE, {"cluster": {"nodes": 1}}),
    "gpus-for-ranks": (
        {"cluster": {"nproc_per_node": 4}}, World(nodes=1, nproc_per_node=4, gpus=2), {},
    ),
    "one-warmup": (
        {"scheduler": {"warmup_steps": 3, "warmup_ratio": 0.1}}, ONE,
        {"scheduler": {"warmup_ratio": 0.1}},
    ),
    "warmup-ends": (
        {"scheduler": {"warmup_steps": 9}, "training": {"epochs": None, "max_steps": 5}}, ONE,
        {"scheduler": {"warmup_steps": 0}, "training": {"epochs": None, "max_steps": 5}},
    ),
    "minimum-below-peak": (
        {"scheduler": {"name": "polynomial", "minimum_rate": 0.1}}, ONE,
        {"scheduler": {"name": "polynomial", "minimum_rate": 9e-5}},
    ),
    "plateau-reduces": (
        {"scheduler": {"name": "reduce_lr_on_plateau", "factor": 1.0}, **EVALUATED}, ONE,
        {"scheduler": {"name": "reduce_lr_on_plateau", "factor": 0.9}, **EVALUATED},
    ),
    "plateau-needs-evaluation": (
        {"scheduler": {"name": "reduce_lr_on_plateau"}}, ONE,
        {"scheduler": {"name": "reduce_lr_on_plateau"}, **EVALUATED},
    ),
    "early-stopping-needs-evaluation": (
        {"training": {"early_stopping_patience": 2}, "data": {"eval_rows": 2}}, ONE,
        {"training": {"early_stopping_patience": 2, "eval_steps": 2}, "data": {"eval_rows": 2}},
    ),
    "best-needs-evaluation": (
        {"checkpoint": {"save_best": True}}, ONE, {"checkpoint": {"save_best": True}, **EVALUATED},
    ),
    "two-betas": ({"optimizer": {"betas": [0.9]}}, ONE, {"optimizer": {"betas": [0.9, 0.99]}}),
    "nesterov-has-momentum": (
        {"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0.0}}, ONE,
        {"optimizer": {"name": "sgd", "nesterov": True}},
    ),
    "adafactor-sees-whole-matrices": (
        {"optimizer": {"name": "adafactor"}}, TWO,
        {"optimizer": {"name": "adafactor"}, "strategy": {"name": "ddp"}},
    ),
    "8bit-needs-tensors": (
        {"optimizer": {"name": "adamw_8bit"}, "strategy": {"name": "zero1"}}, TWO,
        {"optimizer": {"name": "adamw_8bit"}, "strategy": {"name": "hsdp"}},
    ),
    "activation-checkpointing-is-known": (
        {"training": {"activation_checkpointing": "0"}}, ONE,
        {"training": {"activation_checkpointing": 2}},
    ),
    "paging-needs-a-gpu": (
        {"optimizer": {"name": "adamw_paged"}}, ONE, {"optimizer": {"name": "adamw_8bit"}},
    ),
    "freeze-trains-something": (
        {"method": {"name": "freeze", "layers": 0}}, ONE,
        {"method": {"name": "freeze", "layers": 0, "extra_modules": ["norm"]}},
    ),
    "freeze-all-stands-alone": (
        {"method": {"name": "freeze", "modules": ["all", "mlp"]}}, ONE,
        {"method": {"name": "freeze", "modules": ["mlp"]}},
    ),
    "freeze-names-modules": (
        {"method": {"name": "freeze", "modules": []}}, ONE, {"method": {"name": "freeze"}},
    ),
    "freeze-names-exist": (
        {"method": {"name": "freeze", "modules": ["attention"], "extra_modules": ["norms"]}}, ONE,
        {"method": {"name": "freeze", "modules": ["self_attn"], "extra_modules": ["norm"]}},
    ),
    "pissa-without-dora": (
        {"method": {"pissa": True, "dora": True}}, ONE, {"method": {"pissa": True}},
    ),
    "dora-without-zero3": (
        {"method": {"dora": True}, "strategy": {"name": "zero3"}}, TWO,
        {"method": {"dora": True}, "strategy": {"name": "fsdp"}},
    ),
    "dora-merges-before": (
        {"method": {"dora": True, "merge_first": ["ADAPTER"]}}, ONE,
        {"method": {"merge_first": ["ADAPTER"]}},
    ),
    "adapters-are-there": (
        {"method": {"merge_first": ["/no/adapter"]}}, ONE, {"method": {"merge_first": ["ADAPTER"]}},
    ),
    "adapter-says-its-shape": (
        {"method": {"adapter": "ADAPTER", "rank": 16, "target_modules": ["q_proj"]}}, ONE,
        {"method": {"adapter": "ADAPTER", "rank": 4}},
    ),
    "adapter-has-begun": (
        {"method": {"adapter": "ADAPTER", "pissa": True}}, ONE, {"method": {"adapter": "ADAPTER"}},
    ),
    "one-evaluation-set": (
        {"data": {"eval_rows": 2, "eval_path": "x"}}, ONE, {"data": {"eval_rows": 0}},
    ),
    "evaluation-needs-rows": (
        {"training": {"eval_steps": 2}}, ONE,
        {"training": {"eval_steps": 2}, "data": {"eval_rows": 2}},
    ),
    "model-is-there": ({"model": {"name_or_path": "/no/model"}}, ONE, {}),
    "model-has-safetensors": ({"model": {"name_or_path": "WEIGHTLESS"}}, ONE, {}),
    "model-is-not-quantised": ({"model": {"name_or_path": "QUANTISED"}}, ONE, {}),
    "zero-extra-agrees": (
        {"strategy": {"name": "zero2", "extra": {"gradient_clipping": 3.0}}}, TWO,
        {"strategy": {"name": "zero2", "extra": {"wall_clock_breakdown": True}}},
    ),
    "stop-before-the-end": (
        {"training": {"epochs": None, "max_steps": 5, "stop_after_steps": 6}}, ONE,
        {"training": {"epochs": None, "max_steps": 5, "stop_after_steps": 5}},
    ),
    "auto-names-a-run": ({"resume": {"path": "auto"}}, ONE, {}),
    "run-dir-is-new": ({"run_dir": {"path": "."}}, ONE, {"run_dir": {"path": "./new"}}),
}  # fmt: skip


def test_every_rule_has_a_case() -> None:
    assert {rule.id for rule in checks.RULES} == CASES.keys()


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_breaks_alone_and_is_mended(
    rule: str, good: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    broken, world, mended = CASES[rule]
    if rule == "model-has-safetensors":
        (tmp_path / "config.json").write_text("{}")
        broken = {"model": {"name_or_path": str(tmp_path)}}
    if rule == "model-is-not-quantised":
        shutil.copytree(good["model"]["name_or_path"], tmp_path / "quantised")
        settings = json.dumps({"quantization_config": {"quant_method": "fp8"}})
        (tmp_path / "quantised/config.json").write_text(settings)
        broken = {"model": {"name_or_path": str(tmp_path / "quantised")}}
    assert broken_ids(build(good, broken), world) == {rule}
    world = World(nodes=1, nproc_per_node=world.nproc_per_node, gpus=0)
    assert broken_ids(build(good, mended), world) == set()


def changes_of(fix: str) -> dict[str, dict[str, Any]]:
    """The overrides of a fix, those of its first alternative."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in re.findall(r"([a-z_.]+)=([^\s]+)", fix.split(", or")[0]):
        section, _, setting = key.partition(".")
        changes.setdefault(section, {})[setting or "name"] = yaml.safe_load(value)
    return changes


IN_WORDS = {
    "model-is-there", "model-has-safetensors", "model-is-not-quantised", "run-dir-is-new",
    "zero-extra-agrees", "auto-names-a-run",
}  # fmt: skip


@pytest.mark.parametrize(
    "rule", [rule for rule in checks.RULES if rule.id not in IN_WORDS], ids=lambda rule: rule.id
)
def test_the_fix_that_a_rule_prints_mends_it(rule: Any, good: dict[str, dict[str, Any]]) -> None:
    broken, world, _ = CASES[rule.id]
    config = build(good, broken)
    fix = changes_of(rule.fix(config, world))
    assert fix, "it names overrides"
    merged = {s: {**broken.get(s, {}), **fix.get(s, {})} for s in {**broken, **fix}}
    per_node = merged.get("cluster", {}).get("nproc_per_node") or world.nproc_per_node
    mended = build(good, merged)
    assert broken_ids(mended, World(nodes=1, nproc_per_node=per_node, gpus=world.gpus)) == set()


def test_several_broken_rules_are_all_reported(good: dict[str, dict[str, Any]]) -> None:
    config = build(good, {"strategy": {"name": "single"}, "training": {"global_batch_size": 3}})
    assert broken_ids(config, TWO) == {"single-is-one-rank", "batch-divides"}


def test_the_batch_sentence_names_values_and_the_fix(good: dict[str, dict[str, Any]]) -> None:
    (line,) = checks.broken_rules(build(good, {"training": {"global_batch_size": 7}}), TWO)
    assert line == (
        "training.global_batch_size=7 is no multiple of 2 ranks × training.micro_batch_size=2 "
        "→ training.global_batch_size=8 [batch-divides]"
    )


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_can_be_fetched_says_how(
    model: str, good: dict[str, dict[str, Any]], cache: Path
) -> None:
    missing = {"model": {"name": model, "name_or_path": str(cache / "models/none")}}
    (line,) = checks.broken_rules(build(good, missing), ONE)
    assert f"→ shardway fetch {model}" in line


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("owner/model-1.5", True), ("model", False), ("/a/b", False), ("a/b/c", False)],
)
def test_hub_ids_are_told_from_paths(name: str, is_id: bool) -> None:
    assert checks.is_hub_id(name) is is_id
