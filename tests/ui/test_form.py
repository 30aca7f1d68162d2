"""What is typed on the page becomes what is typed in a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import rules
from launcher.config import SECTIONS, store
from launcher.errors import UserError
from launcher.ui import experiment, form
from launcher.ui.places import Places


@pytest.fixture
def places(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.chdir(tmp_path)
    return Places.of([tmp_path])


def typed(**values: Any) -> form.Values:
    """The page with the tiny model and these values, `__` for a dot."""
    chosen = {key: value for key, value in values.items() if key in form.CHOSEN}
    start = form.begun({"model": "tiny", **chosen})
    return start | {key.replace("__", "."): value for key, value in values.items()}


def test_every_setting_on_the_page_is_one() -> None:
    for key in form.FIELDS:
        section = key.partition(".")[0]
        known = key in SECTIONS or key == form.ACCUMULATION or key in store.settings(section)
        assert known, key


def test_the_defaults_need_no_word(places: Places) -> None:
    assert form.look(form.begun(), "", places).overrides == []


def test_what_differs_is_typed(places: Places) -> None:
    values = typed(method="qlora", method__bits="8", data__packing=True, training__seed="7")
    assert form.look(values, "", places).overrides == [
        *("model=tiny", "method=qlora", "data.packing=true", "method.bits=8", "training.seed=7")
    ]


def test_the_command_gives_the_same_configuration(places: Places) -> None:
    values = typed(
        method__target_modules="q_proj, v_proj",
        data__path="it's a 'file', [with] {signs} = \\ and 50%.jsonl",
        training__max_steps="5",
        training__epochs="",
        optimizer__learning_rate="3e-4",
        cluster="slurm",
        cluster__gpu_type="1e5",
    )
    found = form.look(values, "", places)
    words = shlex.split(found.command("x"))
    assert words[:2] == ["shardway", "train"]
    config = rules.compose(words[2:])
    assert config.data.path == values["data.path"]
    assert config.method.target_modules == ["q_proj", "v_proj"]  # type: ignore[union-attr]
    assert (config.training.max_steps, config.training.epochs) == (5, None)
    assert config.optimizer.learning_rate == 3e-4
    assert config.cluster.gpu_type == "1e5"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["'", "\\", "\\'", "a\\", "''", "é ü", "null", "true", "1_0", "~", "a,b"]
)
def test_text_stays_text(places: Places, text: str) -> None:
    found = form.look(typed(data__path=text), "", places)
    config = rules.compose([word for word in found.overrides if word.startswith("data.path")])
    assert config.data.path == text


def test_the_global_batch_follows_from_ranks(places: Places) -> None:
    values = typed(cluster__cpu_processes="2", training__micro_batch_size="3", accumulation="4")
    found = form.look(values, "", places)
    assert found.config
    assert found.config.training.global_batch_size == 24
    assert "training.global_batch_size=24" in found.overrides
    assert not found.problems


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "9" * 30])
def test_accumulation_is_a_number(places: Places, text: str) -> None:
    (problem,) = form.look(typed(accumulation=text), "", places).problems
    assert problem.startswith(f"accumulation={text}: ")


def test_rules_fire_beside_their_group_and_are_mended(places: Places) -> None:
    values = typed(training__max_steps="20")
    (problem,) = form.look(values, "", places).problems
    assert form.group_of(problem) == "Length, batch and saving"
    mended, more = form.apply(values, "", form.fixes([problem]))
    assert form.look(mended, more, places).problems == []


@pytest.mark.parametrize(
    "lines",
    ["data.path=nothing.jsonl", "data.eval_path=nothing.jsonl"],
)
def test_what_is_wrong_is_told_at_once(places: Places, lines: str) -> None:
    """A file that is not there keeps no rule from being told."""
    found = form.look(typed(training__max_steps="20"), lines, places)
    said = "\n".join(found.problems)
    assert "nothing.jsonl" in said
    assert "[length-of-training]" in said


def test_files_are_read_anew_when_they_change(places: Places) -> None:
    rows = places.home / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    more = "data.path=rows.jsonl\ndata.format=alpaca"
    assert form.look(typed(), more, places).problems == []
    rows.write_text("nonsense\n")
    (problem,) = form.look(typed(), more, places).problems
    assert "rows.jsonl:1" in problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data.path=/etc/passwd", "data.path=/etc/passwd is outside"),
        ("data.path=${oc.env:HOME}", "holds \\$"),
        ("data.template=$\\{oc.env:HOME}", "holds \\$"),
        ("data.path=hub:/etc", "names none of the hub"),
        ("data.path=hub:../outside", "names none of the hub"),
        ("hydra.run.dir=/tmp/x", "hydra.run.dir is not taken"),
        ("++hydra.run.dir=/tmp/x", "hydra.run.dir is not taken"),
        ("cluster.setup=[id]", "cluster.setup is not taken"),
        ("+cluster.environment.LD_PRELOAD=x", "is not taken"),
        ("model.trust_remote_code=true", "is not taken"),
        ("run_dir=/tmp/x", "run_dir is not taken"),
        ("launch.dry_run=true", "is not taken"),
        ("experiment=demo", "is not taken"),
        ("method={name:lora}", "names a file of conf/method/"),
        ("--config-dir=/tmp", "is no override"),
        ("rm -rf", "is no override"),
        ("data.nme=x", "did you mean data.name"),
        ("training.seed=1e400", "training.seed=inf"),
        ("training.micro_batch_size=" + "9" * 400, "training.micro_batch_size"),
    ],
)
def test_what_a_page_does_not_take(places: Places, line: str, said: str) -> None:
    found = form.look(form.begun({"model": "tiny"}), line, places)
    with pytest.raises(UserError, match=said):
        raise UserError("\n".join(found.problems) or "nothing")


def test_another_file_of_a_group_brings_its_values() -> None:
    values = form.begun() | {"scheduler": "polynomial", "method.rank": "77"}
    changed = form.switched(values, "scheduler")
    assert changed["scheduler.minimum_rate"] == "1e-07"
    assert "scheduler.cycles" not in changed
    assert changed["method.rank"] == "77"


def test_an_experiment_file_comes_back_as_it_was(places: Places) -> None:
    values = typed(method="qlora", data__packing=True, accumulation="2", method__alpha="12.5")
    more = "checkpoint.save_best=true\n+data.columns.output=answer\n+method.rank_pattern.q_proj=16"
    found = form.look(values, more, places)
    path = experiment.save(places, "mine", found)
    back, lines = experiment.load(places, "mine")
    again = form.look(back, lines, places)
    assert again.config == found.config
    assert back[form.ACCUMULATION] == "2"
    assert "mine" in experiment.names(places)
    assert yaml.safe_load(path.read_text())["defaults"][-1] == "_self_"
    with pytest.raises(UserError, match="exists"):
        experiment.save(places, "mine", found)


def test_the_demo_experiment_loads(places: Places) -> None:
    values, more = experiment.load(places, "demo")
    found = form.look(values, more, places)
    assert found.config
    assert found.config.training.max_steps == 14
    assert values[form.ACCUMULATION] == "1"
    assert values["method.rank"] == "16"


@pytest.mark.parametrize("name", ["", "../x", "nothing", "a b"])
def test_what_is_no_experiment(places: Places, name: str) -> None:
    with pytest.raises(UserError, match="is not there"):
        experiment.load(places, name)


def test_a_file_that_is_none_is_refused(places: Places) -> None:
    folder = places.home / "experiments/experiment"
    folder.mkdir(parents=True)
    (folder / "list.yaml").write_text("- a\n")
    (folder / "broken.yaml").write_text("{")
    for name in ("list", "broken"):
        with pytest.raises(UserError, match="is no experiment file"):
            experiment.load(places, name)
