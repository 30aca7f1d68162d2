"""Every rule is broken by its own example, and the fix in its message solves the problem."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.commands import rules
from launcher.commands.fetch import fetch
from launcher.config import Config
from launcher.config.compose import compose
from launcher.config.overrides import apply_changes, overrides_in
from launcher.config.rules import table
from launcher.config.rules.rule import Example, Machine, Rule, World
from launcher.config.rules.table import RULES
from launcher.config.store import ConfigError
from launcher.errors import UserError
from tests.helpers.commands import shardway

DORA_ADAPTER = {
    "adapter/adapter_config.json": '{"peft_type": "LORA", "r": 8, "use_dora": true}',
    "adapter/adapter_model.safetensors": "",
}
# More commands that break a rule whose example covers only one variant of message or fix.
MORE: list[tuple[str, str | Example]] = [
    ("length-of-training", "training.epochs=null"),
    ("freeze-has-layers", "method=freeze method.layers=-9"),
    ("new-tokens-are-texts", "'model.add_tokens=[\"\"]'"),
    ("new-tokens-are-texts", "'model.add_tokens=[a,\" \"]'"),
    ("new-tokens-are-texts", "model.add_tokens=[a,b,a,c,b]"),
    ("new-tokens-are-texts", "model.add_tokens=[a,[b]]"),
    ("dora-without-zero3", "method.dora=true strategy=zero3_offload"),
    ("dora-without-zero3", Example("method.adapter=adapter strategy=zero3", files=DORA_ADAPTER)),
    ("batch-divides", "training.micro_batch_size=4 training.global_batch_size=2"),
    ("hsdp-groups", "strategy=hsdp strategy.shard_size=4 cluster.nproc_per_node=2"),
    ("adafactor-sees-whole-matrices", "optimizer=adafactor strategy=zero1"),
    ("8bit-needs-tensors", "optimizer=adamw_8bit strategy=zero3"),
    ("plateau-needs-evaluation", "scheduler=reduce_lr_on_plateau data.eval_rows=4"),
    ("activation-checkpointing-is-known", "training.activation_checkpointing=0"),
    ("freeze-trains-something", "method=freeze method.layers=0 method.modules=[mlp]"),
    ("adapters-are-there", "method.merge_first=[./one,./two]"),
    ("quant-storage-is-not-cast", "method=qlora method.quant_storage=bfloat16 precision=fp16"),
    ("8bit-has-one-form", "method=qlora method.bits=8 method.quant_storage=float32"),
    ("run-dir-is-new", "run_dir=."),
    ("one-kind-of-memory", "cluster=slurm cluster.mem_per_cpu=4G cluster.mem=0"),
    ("variables-have-names", "cluster=slurm 'cluster.environment={A B: c}'"),
    ("flags-are-not-settings", "cluster=slurm cluster.extra_flags=[-n4]"),
    ("flags-are-not-settings", "cluster=slurm 'cluster.extra_flags=[\"--ntasks-per-n=4\"]'"),
    ("liger-needs-a-gpu", "training.loss=liger"),
    ("zero-extra-agrees", "strategy=zero3 precision=pure_bf16 +strategy.extra.fp16.enabled=true"),
]


def cases() -> list[object]:
    """(rule, example) pairs: the example of each rule, and the ones in MORE."""
    own = [pytest.param(rule, rule.example, id=rule.id) for rule in RULES]
    more = [
        pytest.param(
            rules.find_rule(id),
            example if isinstance(example, Example) else Example(example),
            id=f"{id}-{number}",
        )
        for number, (id, example) in enumerate(MORE)
    ]
    return [*own, *more]


@pytest.fixture(autouse=True)
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder that is empty except for FOLDER, the model that fixes refer to."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("FOLDER").symlink_to(tiny)


def composed(overrides: list[str]) -> Config:
    """Compose with an existing model, unless the overrides name another."""
    return compose(["model=tiny", *overrides])


def broken_ids(config: Config, world: World) -> set[str]:
    return {line.rpartition("[")[2].rstrip("]") for line in table.broken_rules(config, world)}


def breaking(rule: Rule, example: Example) -> tuple[list[str], str]:
    """The overrides of the example, which break only this rule, and the fix."""
    rules.write_files(example.files)
    overrides = shlex.split(example.overrides)
    config = composed(overrides)
    world = example.world(config)
    assert broken_ids(config, world) == {rule.id}, "its example breaks it and no other"
    sentence, fix = rule.message(config, world), rule.fix(config, world)
    assert re.search(r"[a-z_]+=\S", sentence), f"{sentence}: names a setting and its value"
    return overrides, fix


@pytest.mark.parametrize(("rule", "example"), cases())
def test_a_rule_breaks_alone_and_its_fix_mends_it(rule: Rule, example: Example) -> None:
    overrides, fix = breaking(rule, example)
    changes = overrides_in(fix)
    if not changes:
        assert rule.id in IN_WORDS, f"{fix}: no override, so a test of its own must do it"
        IN_WORDS[rule.id](overrides, fix)
        after = composed(overrides)
    else:
        after = composed(apply_changes(overrides, changes))
    assert broken_ids(after, example.world(after)) == set()


def convert(overrides: list[str], fix: str) -> None:
    """Save the tiny model in the format before safetensors, and run the code in the message."""
    model = AutoModelForCausalLM.from_pretrained("FOLDER")
    model.config.save_pretrained("model")
    torch.save(model.state_dict(), "model/pytorch_model.bin")
    assert broken_ids(composed(overrides), World(1, 1)) == {"model-has-safetensors"}
    code = re.search(r"AutoModel\S+", fix)
    assert code is not None
    eval(code[0], {"AutoModelForCausalLM": AutoModelForCausalLM, "FOLDER": "model"})
    assert Path("model/model.safetensors").is_file()


def add_template(overrides: list[str], fix: str) -> None:
    assert "put a chat_template.jinja into ./model" in fix
    Path("model/chat_template.jinja").write_text(Path("FOLDER/chat_template.jinja").read_text())


def tie(overrides: list[str], fix: str) -> None:
    assert fix.startswith("set tie_word_embeddings to true in ./model/config.json")
    Path("model/config.json").write_text('{"tie_word_embeddings": true}')


def untie(overrides: list[str], fix: str) -> None:
    assert fix.startswith("set tie_word_embeddings to false in ./model/config.json")
    Path("model/config.json").write_text('{"tie_word_embeddings": false}')


def leave_out(overrides: list[str], fix: str) -> None:
    assert fix == "remove them from strategy.extra"
    overrides[:] = [word for word in overrides if "strategy.extra" not in word]


def leave_name_out(overrides: list[str], fix: str) -> None:
    assert fix == "remove data.columns.sytem"
    overrides[:] = [word for word in overrides if "data.columns.sytem" not in word]


def name_the_secret(overrides: list[str], fix: str) -> None:
    assert fix.startswith("export WANDB_API_KEY before this command")
    overrides[-1] = "cluster.secrets=[WANDB_API_KEY]"


# Rules whose fix is not an override: each function applies the fix by hand.
IN_WORDS: dict[str, Callable[[list[str], str], None]] = {
    "model-has-safetensors": convert,
    "chat-has-a-template": add_template,
    "head-is-there": tie,
    "tied-head-is-the-embedding": untie,
    "zero-extra-agrees": leave_out,
    "columns-and-tags": leave_name_out,
    "setup-has-no-secrets": name_the_secret,
}


def test_a_rule_without_an_example_or_with_a_useless_fix_is_caught() -> None:
    rule = rules.find_rule("two-betas")
    with pytest.raises(AssertionError, match="its example breaks it"):
        test_a_rule_breaks_alone_and_its_fix_mends_it(rule, Example(""))
    idle = replace(rule, fix=lambda c, w: "optimizer.betas=[0.9]")
    with pytest.raises(AssertionError):
        test_a_rule_breaks_alone_and_its_fix_mends_it(idle, rule.example)
    wordy = replace(rule, fix=lambda c, w: "think again")
    with pytest.raises(AssertionError, match="a test of its own must do it"):
        test_a_rule_breaks_alone_and_its_fix_mends_it(wordy, rule.example)


def test_a_missing_model_is_fetched_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    _, fix = breaking(rules.find_rule("model-is-there"), Example(""))
    assert fix == "shardway fetch tiny"
    fetch("tiny")
    assert broken_ids(composed([]), World(1, 1)) == set()


@pytest.mark.parametrize(
    ("files", "overrides", "refused"),
    [
        ({"tokenizer_config.json": '{"chat_template": null}'}, [], True),
        ({"tokenizer_config.json": "{"}, [], True),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, [], False),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "x"}, [], False),
        ({"tokenizer_config.json": "{}", "additional_chat_templates/a.jinja": "x"}, [], False),
        ({"tokenizer_config.json": "{}"}, ["data=alpaca", "data.path=x.json"], True),
        ({"tokenizer_config.json": "{}"}, ["data=pretrain", "data.path=x.txt"], False),
        ({"tokenizer_config.json": "{}"}, ["model.trust_remote_code=true"], False),
        ({}, [], False),
    ],
)
def test_a_chat_template_is_searched_in_the_same_places_as_in_transformers(
    files: dict[str, str], overrides: list[str], refused: bool
) -> None:
    model = {"config.json": "{}", "model.safetensors": "", **files}
    rules.write_files({f"model/{name}": content for name, content in model.items()})
    config = composed(["model.name_or_path=./model", *overrides])
    assert broken_ids(config, World(1, 1)) == ({"chat-has-a-template"} if refused else set())


def test_settings_of_two_precisions_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="growth_window is a setting of precision=fp16 and not"):
        composed(["precision=fp16", "precision.name=pure_bf16"])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_flash_attention_passes_if_it_can_run(precision: str) -> None:
    config = composed(["model.attention=flash_attention_2", f"precision={precision}"])
    assert broken_ids(config, World(1, 1, Machine(gpus=1, flash_attention=True))) == set()
    assert broken_ids(config, World(1, 1, Machine(gpus=1))) == {"flash-attention-is-installed"}
    assert broken_ids(config, World(1, 1)) == {"flash-attention-needs-a-gpu"}


@pytest.mark.parametrize("setting", ["loss", "kernels"])
def test_liger_passes_if_it_can_run(setting: str) -> None:
    """Liger can run on a GPU, or with Triton's interpreter."""
    config = composed([f"training.{setting}=liger", "precision=bf16"])
    assert broken_ids(config, World(1, 1, Machine(gpus=1, liger=True))) == set()
    assert (
        broken_ids(config, World(1, 1, Machine(gpus=0, liger=True, triton_interpreter=True)))
        == set()
    )
    assert broken_ids(config, World(1, 1, Machine(gpus=0, liger=True))) == {"liger-needs-a-gpu"}
    assert broken_ids(config, World(1, 1, Machine(gpus=0, triton_interpreter=True))) == {
        "liger-is-installed"
    }
    assert broken_ids(config, World(1, 1, Machine(gpus=1))) == {"liger-is-installed"}


def test_the_fix_for_liger_changes_the_requested_settings() -> None:
    world = World(1, 1, Machine(gpus=1))
    both = composed(["training.loss=liger", "training.kernels=liger"])
    (line,) = table.broken_rules(both, world)
    assert line == (
        "training.loss=liger and training.kernels=liger: the packages liger-kernel and triton are "
        "not both installed → training.loss=chunked training.kernels=torch, or pip install "
        "'shardway[liger]' [liger-is-installed]"
    )
    (line,) = table.broken_rules(composed(["training.kernels=liger"]), world)
    assert "→ training.kernels=torch, or pip install" in line


def test_an_explanation_is_composed_and_leaves_no_files() -> None:
    before = list(Path.cwd().iterdir())
    said = rules.explain(rules.find_rule("adapter-says-its-shape"))
    assert said == EXPLAINED
    assert list(Path.cwd().iterdir()) == before
    said = rules.explain(rules.find_rule("gpus-for-ranks"))
    assert "on a machine with 2 GPUs:\n    shardway train cluster.nproc_per_node=4\n" in said
    assert "This fixes it:\n    shardway train cluster.nproc_per_node=2" in said
    said = rules.explain(rules.find_rule("chat-has-a-template"))
    assert said.endswith("put a chat_template.jinja into ./model (an instruct model of the same "
                         "family has one)")  # fmt: skip


EXPLAINED = """\
adapter-says-its-shape: settings of the adapter's shape agree with the adapter of method.adapter

This breaks it:
    shardway train method.adapter=adapter method.rank=16

with these files:
    adapter/adapter_config.json        {"peft_type": "LORA", "r": 4}
    adapter/adapter_model.safetensors  (empty)

and is refused with:
    method.rank=16, but the adapter adapter has other values and keeps them
    → method.rank=4

This fixes it:
    shardway train method.adapter=adapter method.rank=4"""


@pytest.mark.parametrize(
    ("id", "sentence"),
    [
        ("batch", "batch is not a rule; did you mean batch-divides?"),
        ("batch_divide", "did you mean batch-divides?"),
        ("pissa-without", "did you mean pissa-without-dora?"),
        ("xyzzy", "xyzzy is not a rule; shardway rules lists them all"),
    ],
)
def test_an_unknown_rule_id_gets_suggestions(id: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        rules.find_rule(id)


def test_the_verb_lists_explains_and_refuses(tmp_path: Path) -> None:
    listed = shardway("rules", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in listed if line[0] != " "] == [rule.id for rule in RULES]
    assert max(map(len, listed)) <= 100
    done = shardway("rules", "hsdp-groups", cwd=tmp_path)
    assert done.returncode == 0
    assert "→ strategy.shard_size=4, or strategy=fsdp" in done.stdout
    done = shardway("rules", "hsdp", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hsdp is not a rule; did you mean hsdp-groups?\n"
