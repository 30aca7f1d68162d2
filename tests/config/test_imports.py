"""Files of LLaMA-Factory: every key is accounted for, and the command composes to what it means."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments

from launcher.config import Config
from launcher.config.compose import compose
from launcher.config.imports import llamafactory
from launcher.config.imports.llamafactory_keys import IGNORED, UNUSED
from launcher.config.imports.translation import Translation
from launcher.folders import paths

HERE = [Path()]
SFT: dict[str, Any] = {  # the form of its examples
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "q_proj,v_proj",
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 1024,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/first",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
# The arguments that LLaMA-Factory adds to those of transformers (its hparams, August 2026).
NAMES = Path(__file__).with_name("llamafactory_arguments.txt").read_text().split()
TRAINER = {field.name: field.default for field in dataclasses.fields(Seq2SeqTrainingArguments)}


def translated(ranks: int = 1, folders: list[Path] = HERE, **changes: Any) -> Translation:
    return llamafactory.translate(SFT | changes, folders, ranks, None)


def composed(**changes: Any) -> Config:
    result = translated(**changes)
    assert not result.refused
    return compose(result.words)


@pytest.mark.parametrize("key", [*NAMES, *TRAINER])
def test_every_key_is_known(key: str) -> None:
    """A key that nobody takes would be refused as unknown."""
    result = translated(**{key: SFT.get(key, "a value")}) if key in (*IGNORED, *UNUSED) else None
    messages = (*result.refused.values(), *result.ignored.values()) if result else ()
    assert not any("is not a key" in message for message in messages)
    if result is None:  # taken by the translation of training, of the export or of chat
        without = {
            name: value for name, value in SFT.items() if name not in ("do_train", "output_dir")
        }
        kinds = [SFT | {"quantization_bit": 4}, without, without | {"export_dir": "x"}]
        known = [_known(settings) for settings in kinds]
        assert any(key in names for names in known)


def _known(settings: dict[str, Any]) -> set[str]:
    from launcher.config.imports import translation

    readers: list[translation.Reader] = []

    class Remembered(translation.Reader):
        def finish(self, *tables: Any) -> Translation:
            readers.append(self)
            return super().finish(*tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llamafactory, "Reader", Remembered)
        llamafactory.translate(settings, HERE, 1, None)
    return readers[0].known


def test_a_key_that_nobody_knows_is_refused_with_the_nearest() -> None:
    (stated, reason), *_ = translated(wramup_ratio=0.1, use_galor=True).refused.items()
    assert stated == "wramup_ratio: 0.1"
    assert "not a key of LLaMA-Factory" in reason
    assert "use_galore" in translated(use_galor=True).refused["use_galor: True"]


def test_an_example_becomes_what_it_means() -> None:
    config = composed(ranks=4)
    assert (config.method.name, config.precision.name, config.strategy.name) == (
        "lora",
        "bf16",
        "ddp",
    )
    assert config.method.rank == 16
    assert config.method.target_modules == ["q_proj", "v_proj"]
    assert config.training.micro_batch_size == 2
    assert config.training.global_batch_size == 2 * 4 * 4
    assert config.data.name == "identity,alpaca_en_demo"
    assert config.data.dataset_info == "data/dataset_info.json"
    assert config.scheduler.warmup_ratio == 0.1
    assert config.run_dir == "saves/first"


def test_what_a_file_leaves_out_has_the_default_of_llamafactory() -> None:
    """Numbers of transformers' own defaults, which are not Shardway's."""
    keys = ("lora_rank", "learning_rate", "per_device_train_batch_size", "lr_scheduler_type")
    settings = {
        key: value for key, value in SFT.items() if key not in (*keys, "bf16", "warmup_ratio")
    }
    result = llamafactory.translate(settings, HERE, 1, None)
    config = compose(result.words)
    assert config.optimizer.learning_rate == TRAINER["learning_rate"]
    assert config.training.micro_batch_size == TRAINER["per_device_train_batch_size"]
    assert config.training.epochs == TRAINER["num_train_epochs"]
    assert config.checkpoint.save_steps == TRAINER["save_steps"]
    assert config.scheduler.name == "linear"
    assert config.precision.name == "fp32"
    assert config.training.activation_checkpointing == "full"  # unless a file turns it off


@pytest.mark.parametrize(
    ("changes", "section", "expected"),
    [
        ({"quantization_bit": 4, "double_quantization": False}, "method", {"double_quant": False}),
        ({"quantization_bit": 8}, "method", {"name": "qlora", "bits": 8}),
        ({"finetuning_type": "full", "deepspeed": None}, "method", {"name": "full"}),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": -3},
            "method",
            {"name": "freeze", "layers": -3},
        ),
        ({"pissa_init": True, "pissa_iter": -1}, "method", {"pissa_iterations": None}),
        (
            {"adapter_name_or_path": "a,b", "create_new_adapter": True},
            "method",
            {"merge_first": ["a", "b"]},
        ),
        ({"neat_packing": True}, "data", {"packing": True}),
        ({"stage": "pt", "packing": False}, "data", {"format": "text", "concatenate": False}),
        ({"val_size": 0.1}, "data", {"eval_fraction": 0.1}),
        ({"val_size": 64}, "data", {"eval_rows": 64}),
        ({"mask_history": True}, "data", {"train_on": "last_answer"}),
        ({"enable_thinking": False}, "data", {"template_arguments": {"enable_thinking": False}}),
        (
            {"mix_strategy": "interleave_over"},
            "data",
            {"mixing": "interleave", "stopping": "all_exhausted"},
        ),
        ({"optim": "adamw_bnb_8bit"}, "optimizer", {"name": "adamw_8bit"}),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            },
            "scheduler",
            {"name": "cosine", "minimum_rate": 1e-5},
        ),
        ({"warmup_ratio": None, "warmup_steps": 0.05}, "scheduler", {"warmup_ratio": 0.05}),
        ({"fsdp": "full_shard auto_wrap offload"}, "strategy", {"name": "fsdp", "offload": True}),
        ({"flash_attn": "disabled"}, "model", {"attention": "eager"}),
        ({"add_special_tokens": "<a>,<b, c>"}, "model", {"add_tokens": ["<a>", "<b", "c>"]}),
        ({"eval_strategy": "steps", "eval_steps": 20}, "training", {"eval_steps": 20}),
        ({"report_to": ["wandb"]}, "tracking", {"trackers": ["wandb"]}),
    ],
)
def test_settings_keep_their_meaning(
    changes: dict[str, Any], section: str, expected: dict[str, Any]
) -> None:
    config = getattr(composed(**changes), section)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "dpo"},
        {"finetuning_type": "oft"},
        {"use_galore": True},
        {"rope_scaling": "yarn"},
        {"optim": "apollo_adamw"},
        {"eval_strategy": "epoch"},
        {"num_train_epochs": 1.5},
        {"adapter_name_or_path": "a,b"},
        {"dataset_dir": "REMOTE:somebody/rows"},
        {"do_predict": True},
        {"deepspeed": "nowhere/ds.json"},
        {"hf_hub_token": "hf_secret"},
        {"learning_rate": "fast"},
        {"gradient_accumulation_steps": [8]},
        {"lr_scheduler_kwargs": 5},
    ],
)
def test_what_has_no_equivalent_is_refused_by_name(changes: dict[str, Any]) -> None:
    (key,) = changes
    ((stated, reason),) = translated(**changes).refused.items()
    assert stated.startswith(f"{key}: ")
    assert reason
    assert "hf_secret" not in stated


@pytest.mark.parametrize(
    ("zero", "strategy"),
    [
        ({"stage": 0}, "ddp"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero2"),
        ({"stage": 3, "stage3_prefetch_bucket_size": 1e6}, "zero3"),
    ],
)
def test_a_deepspeed_file_is_read(tmp_path: Path, zero: dict[str, Any], strategy: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    config = composed(deepspeed="ds.json", folders=[tmp_path])
    assert config.strategy.name == strategy
    if "offload_optimizer" in zero:
        assert config.strategy.offload_optimizer == "cpu"
    if strategy == "zero3":
        assert config.strategy.prefetch_bucket_size == 10**6


def test_exports_and_chats_become_their_verbs() -> None:
    merge = {
        "model_name_or_path": "m",
        "adapter_name_or_path": "a",
        "export_dir": "out",
        "export_size": 2,
    }
    result = llamafactory.translate(merge, HERE, 1, None)
    assert result.verb == "consolidate"
    assert result.words == ["a", "--base", "m", "--output", "out", "--max-shard-size", "2GB"]
    asked = {"model_name_or_path": "m", "adapter_name_or_path": "a", "template": "x", "top_p": 0.5}
    result = llamafactory.translate(asked, HERE, 1, None)
    assert (result.verb, result.words) == ("chat", ["a", "--base", "m", "--top-p", "0.5"])


def test_the_verb_prints_a_command_and_writes_an_experiment(tmp_path: Path) -> None:
    rows = paths.bundled("demo/train.jsonl")
    info = {"mine": {"file_name": str(rows)}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    file = tmp_path / "sft.yaml"
    settings = SFT | {"dataset": "mine", "dataset_dir": str(tmp_path), "wrong": 1}
    file.write_text(yaml.safe_dump(settings))

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    refused = call("import", "sft.yaml")
    assert refused.returncode == 2
    assert "wrong: 1" in refused.stdout
    del settings["wrong"]
    file.write_text(yaml.safe_dump(settings))
    experiment = tmp_path / "conf/experiment/mine.yaml"
    done = call("import", "sft.yaml", "--output", "conf/experiment/mine.yaml")
    assert done.returncode == 0
    assert done.stdout.startswith("shardway train \\\n"), done.stderr
    assert experiment.read_text().startswith(
        "# @package _global_\n# shardway train --config-dir conf"
    )
    again = call("import", "sft.yaml", "--output", "conf/experiment/mine.yaml")
    assert again.returncode == 2
    assert "exists" in again.stderr
    shown = call("train", "--config-dir", "conf", "experiment=mine", "--cfg", "job")
    assert yaml.safe_load(shown.stdout)["method"]["rank"] == 16
    for name, text in (
        ("axolotl", "base_model: m\nadapter: lora"),
        ("list", "[1]"),
        ("bad", "a: b: c"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        refused = call("import", f"{name}.yaml")
        assert refused.returncode == 2
        assert "→" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert call("import", "nowhere.yaml").returncode == 2
