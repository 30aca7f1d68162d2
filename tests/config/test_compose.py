"""What is typed composes as its user means it, on the command line and in `compose`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher.config import Config, store
from launcher.config.compose import compose, compose_command_line
from launcher.errors import UserError
from launcher.folders import paths

DEMO_LENGTH = yaml.safe_load((paths.resource("conf") / "data/demo.yaml").read_text())["max_length"]
EXPERIMENTS = {
    "chooses": "defaults: [{override /data: alpaca}]\ntraining: {max_steps: 7}\n",
    "inherits": "defaults: [chooses]\n",
    "steps": "training: {max_steps: 5}\n",
    "epochs": "training: {epochs: 3}\n",
    "both": "training: {epochs: 3, max_steps: 5}\n",
}


def typed_all(line: str) -> list[Config]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shardway train", *shlex.split(line)])
        return compose_command_line()


def typed(line: str) -> Config:
    (config,) = typed_all(line)
    return config


def composed(line: str) -> Config:
    return compose(shlex.split(line))


both_ways = pytest.mark.parametrize("way", [typed, composed])


@pytest.fixture
def my_conf(tmp_path: Path) -> Path:
    """A folder for --config-dir."""
    for name, text in EXPERIMENTS.items():
        file = tmp_path / f"conf/experiment/{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# @package _global_\n{text}")
    model = tmp_path / "conf/model/mine.yaml"
    model.parent.mkdir()
    model.write_text("name: mine\nname_or_path: /x/y\n")
    return tmp_path / "conf"


@both_ways
@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_entries_of_a_mapping_need_no_sign(way: Callable[[str], Config], sign: str) -> None:
    config = way(
        f"""'{sign}data.columns={{instruction: question, output: "a, b"}}' {sign}data.tags.role=who
        '{sign}data.columns.system=my persona' '{sign}data.tags={{user: "it\\"s"}}'
        '{sign}data.sources.a={{path: a.json}}' {sign}data.sources.a.columns.output=reply
        '{sign}data.sources.b={{path: "b,c.json", weight: 2}}' {sign}method.rank_pattern.q_proj=4
        strategy=zero2 '{sign}strategy.extra.a.b=[1,{{c: 2}}]'"""
    )
    data = config.data
    assert data.columns == {
        "instruction": "question",
        "output": "a, b",
        "system": "my persona",
    }
    assert data.tags == {"role": "who", "user": 'it"s'}
    assert (data.sources["a"].path, data.sources["a"].columns) == ("a.json", {"output": "reply"})
    assert (data.sources["b"].path, data.sources["b"].weight) == ("b,c.json", 2)
    assert config.method.rank_pattern == {"q_proj": 4}  # type: ignore[attr-defined]
    assert config.strategy.extra == {"a": {"b": [1, {"c": 2}]}}  # type: ignore[attr-defined]


def test_an_entry_of_a_mapping_can_be_swept_and_removed() -> None:
    runs = typed_all("--multirun method.rank_pattern.q_proj=4,8 data.columns.output=a,b")
    assert [(c.method.rank_pattern["q_proj"], c.data.columns["output"]) for c in runs] == [  # type: ignore[attr-defined]
        *((4, "a"), (4, "b"), (8, "a"), (8, "b"))
    ]
    assert typed("data.columns.output=a ~data.columns.output").data.columns == {}
    assert typed("data.columns.output=a ~data.columns").data.columns == {}
    with pytest.raises(UserError, match=r"data\.columns\.output' does not exist"):
        typed("~data.columns.output")


@pytest.mark.parametrize("key", ["data.colums.output", "method.rank_patern.q_proj"])
def test_a_misspelled_mapping_is_still_refused(key: str) -> None:
    with pytest.raises(UserError, match="is not a setting; did you mean"):
        typed(f"{key}=1")


@both_ways
@pytest.mark.parametrize(
    ("line", "max_steps", "epochs"),
    [
        ("", None, 1),
        ("training.max_steps=100", 100, None),
        ("training.max_steps=100 training.epochs=null", 100, None),
        ("training.max_steps=100 training.epochs=3", 100, 3),
        ("training.epochs=3", None, 3),
        ("training.epochs=3 training.max_steps=null", None, 3),
        ("training.max_steps=null", None, 1),
        ("training.epochs=null", None, None),
        ("experiment=demo", 14, None),
        ("experiment=demo training.max_steps=5", 5, None),
        ("experiment=demo training.epochs=2", None, 2),
    ],
)
def test_a_length_that_is_typed_replaces_the_other(
    way: Callable[[str], Config], line: str, max_steps: int | None, epochs: int | None
) -> None:
    training = way(line).training
    assert (training.max_steps, training.epochs) == (max_steps, epochs)


@pytest.mark.parametrize(
    ("experiment", "lengths", "with_steps", "with_epochs"),
    [
        ("steps", (5, None), (9, None), (None, 9)),
        ("epochs", (None, 3), (9, None), (None, 9)),
        ("both", (5, 3), (9, None), (None, 9)),
    ],
)
def test_a_length_in_an_own_file_is_kept_until_one_is_typed(
    my_conf: Path,
    experiment: str,
    lengths: tuple[int | None, int | None],
    with_steps: tuple[int | None, int | None],
    with_epochs: tuple[int | None, int | None],
) -> None:
    start = f"--config-dir {my_conf} experiment={experiment}"
    for words, expected in (
        ("", lengths),
        ("training.max_steps=9", with_steps),
        ("training.epochs=9", with_epochs),
    ):
        training = typed(f"{start} {words}").training
        assert (training.max_steps, training.epochs) == expected, words


def test_the_runs_of_a_sweep_may_have_different_lengths() -> None:
    runs = typed_all("--multirun training.max_steps=null,10")
    assert [(c.training.max_steps, c.training.epochs) for c in runs] == [(None, 1), (10, None)]


@both_ways
@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("data.path=x.jsonl", ("data", "auto", 2048)),
        ("data.path=x.jsonl data.max_length=64", ("data", "auto", 64)),
        ("'data.sources.a={path: a.json}'", ("data", "auto", 2048)),
        ("data.dataset_info=x.json data.name=a,b", ("a,b", "auto", 2048)),
        ("data.eval_path=x.jsonl", ("demo", "messages", DEMO_LENGTH)),
        ("data.path=x.jsonl data=alpaca", ("alpaca", "alpaca", 2048)),
        ("data.path=x.jsonl data=demo", ("demo", "messages", DEMO_LENGTH)),
        ("data.path=x.jsonl experiment=demo", ("demo", "messages", 80)),
        ("data.path=null", ("demo", "messages", DEMO_LENGTH)),
    ],
)
def test_own_rows_do_not_get_the_settings_of_the_demo(
    way: Callable[[str], Config], line: str, file: tuple[str, str, int]
) -> None:
    data = way(line).data
    assert (data.name, data.format, data.max_length) == file


def test_a_file_that_chooses_the_data_keeps_its_choice(my_conf: Path) -> None:
    start = f"--config-dir {my_conf} data.path=x.jsonl"
    assert typed(f"{start} experiment=chooses").data.format == "alpaca"
    assert typed(f"{start} experiment=inherits").data.format == "alpaca"
    assert typed(f"{start} experiment=steps").data.format == "auto"
    assert typed(f"hydra.searchpath=[{my_conf}] experiment=chooses data.path=x").data.name == (
        "alpaca"
    )
    runs = typed_all(f"{start} --multirun data=alpaca,demo")
    assert [config.data.format for config in runs] == ["alpaca", "messages"]
    for names in ("chooses,steps", "glob(*)"):
        with pytest.raises(UserError, match="some runs of the sweep choose another file of data"):
            typed_all(f"{start} --multirun 'experiment={names}'")


def test_a_frozen_file_keeps_its_choices(tmp_path: Path) -> None:
    config = typed("data=alpaca data.path=x.jsonl")
    (tmp_path / "config.yaml").write_text(store.dump(config))
    again = typed(f"--config-path {tmp_path} --config-name config data.path=y.jsonl run_dir=z")
    assert (again.data.format, again.data.path, again.training.epochs) == ("alpaca", "y.jsonl", 1)
    longer = typed(f"--config-path {tmp_path} --config-name config training.max_steps=9")
    assert (longer.training.max_steps, longer.training.epochs) == (9, None)


@both_ways
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "smollm2_135m"),
        ("model=tiny", "tiny"),
        ("model.name_or_path=/models/Llama-3.1-8B/", "Llama-3.1-8B"),
        ("model=tiny model.name_or_path=owner/name", "name"),
        ("""'model.name_or_path="/a/My model (new)"'""", "My-model-new"),
        ("model.name_or_path=/", "model"),
        ("model.name_or_path=/a/b model.name=mine", "mine"),
    ],
)
def test_the_model_s_name_is_the_end_of_its_path(
    way: Callable[[str], Config], line: str, name: str
) -> None:
    assert way(line).model.name == name


def test_an_own_file_names_the_model(my_conf: Path) -> None:
    line = f"--config-dir {my_conf} model=mine model.name_or_path=/u/v"
    assert typed(line).model.name == "mine"


@both_ways
@pytest.mark.parametrize(
    "word",
    [
        *("training.seed=???", "run_dir=???", "'optimizer.betas=[0.9,???]'", "data.path='???'"),
        *("'data.sources.a={path: ???}'", "data.columns.output=???", "+cluster.x=???"),
    ],
)
def test_a_missing_value_is_refused(way: Callable[[str], Config], word: str) -> None:
    (said,) = shlex.split(word)
    with pytest.raises(UserError) as refused:
        way(word)
    key = said.partition("=")[0].lstrip("+")
    assert str(refused.value) == (
        f"{said}: ??? stands for a value that is missing → {key}=VALUE, or leave it out"
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--multirun training.seed=1,???", "training.seed=1,???: ??? stands"),
        ("experiment=null", "experiment=null names no file of conf/experiment/ → experiment=NAME"),
        ("--multirun experiment=demo,null", "experiment=demo,null names no file of"),
        ("model=3", "model=3 names no file of conf/model/ → model=NAME"),
        (
            """--multirun 'hydra.sweeper.params={training.seed: "1,2"}'""",
            "shardway starts the runs of a sweep itself → --multirun SETTING=A,B",
        ),
        ("--multirun hydra.sweeper.max_batch_size=0 training.seed=1,2", "has no effect here"),
        ("--multirun hydra/launcher=basic training.seed=1,2", "has no effect here"),
        ("experiment=nothing data.path=x.jsonl", "Could not find 'experiment/nothing'"),
    ],
)
def test_what_cannot_be_composed_is_a_sentence(line: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        typed_all(line)
    assert sentence in str(refused.value)
