"""Which variables are secrets, and that their values are in nothing that is written."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from launcher.config import secrets, store
from launcher.config.compose import compose_command_line
from launcher.config.overrides import masked
from launcher.config.schema.cluster import ClusterConfig, SlurmConfig
from launcher.config.secrets import MASK
from launcher.errors import UserError
from tests.helpers.commands import in_process
from tests.helpers.compose import composed

VALUE = "xyz-secret"
SECRET = """
    HF_TOKEN HUGGING_FACE_HUB_TOKEN TOKEN WANDB_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
    CLEARML_API_SECRET_KEY MLFLOW_TRACKING_PASSWORD PGPASSWORD MYSQL_PWD SMTP_PASS apiKey
    hfToken GOOGLE_APPLICATION_CREDENTIALS GITHUB_TOKEN2 SSH_PASSPHRASE hf_token OPENAI_APIKEY
    KEY KEYS SECRETKEY AWSSECRETKEY mysecretkey ENCRYPTIONKEY SIGNINGKEY SSHKEY HF_TOKENS HFTOKENS
    MYSECRETS DBPASSWORDS SSHPASS PGPASS GITHUB_PAT
"""
PLAIN = """
    TOKENIZERS_PARALLELISM KEYBOARD NCCL_IB_PKEY NCCL_DEBUG MAX_TOKENS PWD OLDPWD MONKEY PATH
    HF_TOKEN_PATH SSH_KEY_FILE COMPASS BYPASS PASSES KEYRING_HOME SECRETARY TOKENIZER HOME A1
    NUM_KEYS PATH_MAP
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_a_name_with_a_word_for_a_secret_is_a_secret(name: str) -> None:
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN.split())
def test_a_name_that_only_resembles_one_is_not(name: str) -> None:
    assert not secrets.is_secret_name(name)


def test_secrets_are_those_that_look_so_and_those_that_are_listed() -> None:
    environment = {"HF_TOKEN": VALUE, "NCCL_DEBUG": "INFO", "MINE": VALUE, "OLD": MASK}
    cluster = SlurmConfig(environment=environment, secrets=["MINE", "OTHER"])
    assert secrets.secret_names(cluster) == ["MINE", "OTHER", "HF_TOKEN", "OLD"]
    assert secrets.secret_names(ClusterConfig()) == []


def test_values_come_from_the_setting_then_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = SlurmConfig(environment={"HF_TOKEN": VALUE, "MY_KEY": MASK}, secrets=["OTHER"])
    monkeypatch.setenv("HF_TOKEN", "not this one")
    with pytest.raises(UserError, match="OTHER, MY_KEY must be set in the environment"):
        secrets.secret_values(cluster)
    monkeypatch.setenv("OTHER", "a")
    monkeypatch.setenv("MY_KEY", "b")
    assert secrets.secret_values(cluster) == {"HF_TOKEN": VALUE, "OTHER": "a", "MY_KEY": "b"}


def test_the_frozen_form_has_no_secrets_and_an_older_one_is_read(tmp_path: Path) -> None:
    words = ("cluster=slurm", f"cluster.environment={{HF_TOKEN: {VALUE}, MINE: {VALUE}, A: b}}")
    config = composed(*words, "cluster.secrets=[MINE]")
    assert VALUE not in store.dump(config)
    assert store.leaves(config)["cluster.environment.A"] == "b"
    assert store.leaves(config)["cluster.environment.MINE"] == MASK
    file = tmp_path / "config.yaml"
    file.write_text(store.dump(config))
    assert store.load(file).cluster.environment == {"HF_TOKEN": MASK, "MINE": MASK, "A": "b"}
    former = file.read_text().replace(MASK, VALUE).replace("  secrets:\n  - MINE\n", "")
    file.write_text(former)
    loaded = store.load(file)
    assert loaded.cluster.environment["HF_TOKEN"] == VALUE
    assert f"HF_TOKEN: {MASK}" in store.dump(loaded)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (f"cluster.environment.HF_TOKEN={VALUE}", f"cluster.environment.HF_TOKEN={MASK}"),
        (f"++cluster.environment.HF_TOKEN='{VALUE} a=b'", f"++cluster.environment.HF_TOKEN={MASK}"),
        (f"cluster.environment={{MINE:{VALUE},A:b}}", "cluster.environment={MINE:'•••',A:b}"),
        (f"cluster.environment={{MINE:'{VALUE}'}}", "cluster.environment={MINE:'•••'}"),
        (f"cluster.environment={{MINE:{VALUE}}},{{A:b}}", f"cluster.environment={MASK}"),
        ("cluster.environment.A=b", "cluster.environment.A=b"),
        ("training.max_steps=3", "training.max_steps=3"),
        ("~cluster.environment.MINE", "~cluster.environment.MINE"),
        ("--config-dir=HF_TOKEN", "--config-dir=HF_TOKEN"),
    ],
)  # fmt: skip
def test_overrides_are_masked(word: str, expected: str) -> None:
    assert masked([word], {"HF_TOKEN", "MINE"}) == [expected]


def test_the_command_line_is_masked_once_it_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["cluster=slurm", f"cluster.environment.HF_TOKEN={VALUE}", "cluster.environment.A=b"]
    monkeypatch.setattr(sys, "argv", ["shardway train", *words])
    (config,) = compose_command_line()
    assert config.cluster.environment == {"HF_TOKEN": VALUE, "A": "b"}  # type: ignore[attr-defined]
    assert sys.argv == ["shardway train", words[0], f"{words[1][:28]}={MASK}", words[2]]


@pytest.mark.parametrize("option", [["--cfg", "job"], ["--cfg", "job", "--package", "cluster"]])
def test_what_hydra_prints_has_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    words = (f"cluster.environment.HF_TOKEN={VALUE}", f"cluster.environment.MINE='{VALUE}\n x'")
    listed = ("cluster.secrets=[MINE]", "cluster.environment.A=b")
    assert in_process(monkeypatch, "train", "cluster=slurm", *words, *listed, *option) == 0
    printed = capsys.readouterr().out
    assert VALUE not in printed
    assert f"HF_TOKEN: {MASK}" in printed
    assert f"MINE: {MASK}" in printed
    assert "A: b" in printed
    assert "container_python: null" in printed


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("export WANDB_API_KEY=abc", ["WANDB_API_KEY"]),
        ("module load cuda && HF_TOKEN='a b' python x; export B_KEY=\"c\"", ["HF_TOKEN", "B_KEY"]),
        ("declare -x MINE=abc", ["MINE"]),
        ('export HF_TOKEN="abc$"', ["HF_TOKEN"]),
        ("export HF_TOKEN=abc$(true)", ["HF_TOKEN"]),
        ("export HF_TOKEN+=abc", ["HF_TOKEN"]),
        ("HF_TOKEN[0]=abc", ["HF_TOKEN"]),
        ('eval "HF_TOKEN=abc"', ["HF_TOKEN"]),
        ("read HF_TOKEN <<< abc", ["HF_TOKEN"]),
        ("printf -v HF_TOKEN abc", ["HF_TOKEN"]),
        ("export SSH_KEY=$HOME/.ssh/id", []),
        ("export HF_TOKEN=$(cat ~/.token)", []),
        ('export HF_TOKEN="$OTHER"', []),
        ("export HF_TOKEN=`cat x`", []),
        ("export HF_TOKEN=", []),
        ("export TOKENIZERS_PARALLELISM=false", []),
        ('[ "$HF_TOKEN" = x ] || exit 1', []),
        ("echo HF_TOKEN", []),
    ],
)
def test_a_secret_in_a_line_of_bash_is_found(line: str, names: list[str]) -> None:
    assert secrets.secrets_in_script([line], ["MINE"]) == names


def test_a_run_that_has_its_secret_in_a_setup_line_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new one is refused; see the rule's example."""
    from launcher.config.rules import table
    from launcher.config.rules.rule import Machine, World

    line = f"cluster.setup=['export HF_TOKEN={VALUE}']"
    config = composed("cluster=slurm", line, f"run_dir={tmp_path}", "resume=auto")
    world = World.from_config(config, Machine())
    broken = [problem for problem in table.broken_rules(config, world) if "setup" in problem]
    assert len(broken) == 1
    assert VALUE not in broken[0]
    (tmp_path / "config.yaml").write_text(store.dump(config))
    assert not [problem for problem in table.broken_rules(config, world) if "setup" in problem]
    more = [*config.cluster.setup, "export MY_KEY=abc"]  # type: ignore[attr-defined]
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, setup=more))
    assert "setup-has-no-secrets" in " ".join(table.broken_rules(config, world))
