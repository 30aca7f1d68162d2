"""The values of the page become the command line that a user would type in a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import SECTIONS, store
from launcher.config.compose import compose
from launcher.errors import UserError
from launcher.ui import experiment, form
from launcher.ui.implied import with_implied
from launcher.ui.roots import Roots


@pytest.fixture
def roots(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    monkeypatch.chdir(tmp_path)
    return Roots.of([tmp_path])


def typed(**values: Any) -> form.Values:
    """The form values for the tiny model with these changes; `__` in a name means a dot."""
    chosen = {key: value for key, value in values.items() if key in form.HYDRA_GROUPS}
    start = form.initial_values({"model": "tiny", **chosen})
    return start | {key.replace("__", "."): value for key, value in values.items()}


def test_every_field_on_the_page_is_a_setting() -> None:
    for key in form.FIELDS:
        section = key.partition(".")[0]
        known = key in SECTIONS or key == form.ACCUMULATION or key in store.setting_names(section)
        assert known, key


def test_the_defaults_need_no_overrides(roots: Roots) -> None:
    assert form.check_form(form.initial_values(), "", roots).overrides == []


def test_changed_values_become_overrides(roots: Roots) -> None:
    values = typed(method="qlora", method__bits="8", data__packing=True, training__seed="7")
    assert form.check_form(values, "", roots).overrides == [
        *("model=tiny", "method=qlora", "data.packing=true", "method.bits=8", "training.seed=7")
    ]


def test_the_command_gives_the_same_configuration(roots: Roots) -> None:
    values = typed(
        method__target_modules="q_proj, v_proj",
        data__path="it's a 'file', [with] {signs} = \\ and 50%.jsonl",
        training__max_steps="5",
        training__epochs="",
        optimizer__learning_rate="3e-4",
        cluster="slurm",
        cluster__gpu_type="1e5",
    )
    found = form.check_form(values, "", roots)
    words = shlex.split(found.command("x"))
    assert words[:2] == ["shardway", "train"]
    config = compose(words[2:])
    assert config.data.path == values["data.path"]
    assert config.method.target_modules == ["q_proj", "v_proj"]  # type: ignore[union-attr]
    assert (config.training.max_steps, config.training.epochs) == (5, None)
    assert config.optimizer.learning_rate == 3e-4
    assert config.cluster.gpu_type == "1e5"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["'", "\\", "\\'", "a\\", "''", "é ü", "null", "true", "1_0", "~", "a,b"]
)
def test_text_stays_text(roots: Roots, text: str) -> None:
    found = form.check_form(typed(data__path=text), "", roots)
    config = compose([word for word in found.overrides if word.startswith("data.path")])
    assert config.data.path == text


def test_the_global_batch_follows_from_ranks(roots: Roots) -> None:
    values = typed(cluster__cpu_processes="2", training__micro_batch_size="3", accumulation="4")
    found = form.check_form(values, "", roots)
    assert found.config
    assert found.config.training.global_batch_size == 24
    assert "training.global_batch_size=24" in found.overrides
    assert not found.problems


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "9" * 30])
def test_an_invalid_accumulation_is_reported(roots: Roots, text: str) -> None:
    (problem,) = form.check_form(typed(accumulation=text), "", roots).problems
    assert problem.startswith(f"accumulation={text}: ")


def test_rules_are_shown_in_their_group_and_can_be_fixed(roots: Roots) -> None:
    values = typed(training__max_steps="20", training__epochs="3")
    (problem,) = form.check_form(values, "", roots).problems
    assert form.group_of(problem) == "Length, batch and saving"
    mended, more = form.apply_overrides(values, "", form.fixes([problem]))
    assert form.check_form(mended, more, roots).problems == []
    assert (mended["training.max_steps"], mended["training.epochs"]) == ("20", "")


def test_a_number_of_steps_replaces_the_default_epoch(roots: Roots) -> None:
    values = typed(training__max_steps="20")
    found = form.check_form(values, "", roots)
    assert found.problems == []
    assert found.config
    assert (found.config.training.max_steps, found.config.training.epochs) == (20, None)
    shown = with_implied(values)
    assert shown == values | {"training.epochs": ""}
    assert form.check_form(shown, "", roots).config == found.config
    assert with_implied(typed()) == typed()


def test_own_rows_do_not_get_the_settings_of_the_demo(roots: Roots) -> None:
    (roots.home / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    values = typed(data__path="rows.jsonl", data__packing=True)
    found = form.check_form(values, "", roots)
    assert found.problems == []
    assert found.config
    data = found.config.data
    assert (data.format, data.max_length, data.packing) == ("auto", 2048, True)
    shown = with_implied(values)
    assert (shown["data"], shown["data.max_length"], shown["data.packing"]) == (
        *("base", "2048"),
        True,
    )
    assert form.check_form(shown, "", roots).config == found.config
    assert with_implied(typed(data="alpaca", data__path="rows.jsonl"))["data"] == "alpaca"


@pytest.mark.parametrize(
    "lines",
    ["data.path=nothing.jsonl", "data.eval_path=nothing.jsonl"],
)
def test_all_problems_are_reported_at_once(roots: Roots, lines: str) -> None:
    """A missing file does not hide broken rules."""
    both = typed(training__max_steps="20", training__epochs="3")
    found = form.check_form(both, lines, roots)
    said = "\n".join(found.problems)
    assert "nothing.jsonl" in said
    assert "[length-of-training]" in said


def test_files_are_read_again_when_they_change(roots: Roots) -> None:
    rows = roots.home / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    more = "data.path=rows.jsonl\ndata.format=alpaca"
    assert form.check_form(typed(), more, roots).problems == []
    rows.write_text("nonsense\n")
    (problem,) = form.check_form(typed(), more, roots).problems
    assert "rows.jsonl:1" in problem


def test_the_readme_of_a_folder_is_read_again_when_it_changes(roots: Roots) -> None:
    folder = roots.home / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: a.jsonl\n---\n"
    )
    values = typed(data="alpaca", data__path="set")
    assert form.check_form(values, "", roots).problems == []
    text = "---\nconfigs:\n- config_name: x\n  data_files: missing.jsonl\n---\n"
    (folder / "README.md").write_text(text)
    (problem,) = form.check_form(values, "", roots).problems
    assert "the files of the split train are missing" in problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data.path=/etc/passwd", "data.path=/etc/passwd is outside"),
        ("data.path=${oc.env:HOME}", "contains \\$"),
        ("data.template=$\\{oc.env:HOME}", "contains \\$"),
        ("data.path=hub:/etc", "is not a data set of the hub"),
        ("data.path=hub:../outside", "is not a data set of the hub"),
        ("hydra.run.dir=/tmp/x", "hydra.run.dir cannot be set on the page"),
        ("++hydra.run.dir=/tmp/x", "hydra.run.dir cannot be set on the page"),
        ("cluster.setup=[id]", "cluster.setup cannot be set on the page"),
        ("+cluster.environment.LD_PRELOAD=x", "cannot be set on the page"),
        ("model.trust_remote_code=true", "cannot be set on the page"),
        ("run_dir=/tmp/x", "run_dir cannot be set on the page"),
        ("launch.dry_run=true", "cannot be set on the page"),
        ("experiment=demo", "cannot be set on the page"),
        ("method={name:lora}", "names a file of conf/method/"),
        ("--config-dir=/tmp", "is not an override"),
        ("rm -rf", "is not an override"),
        ("data.nme=x", "did you mean data.name"),
        ("training.seed=1e400", "training.seed=inf"),
        ("training.micro_batch_size=" + "9" * 400, "training.micro_batch_size"),
    ],
)
def test_unsafe_or_invalid_overrides_are_refused(roots: Roots, line: str, said: str) -> None:
    found = form.check_form(form.initial_values({"model": "tiny"}), line, roots)
    with pytest.raises(UserError, match=said):
        raise UserError("\n".join(found.problems) or "nothing")


def test_choosing_another_file_of_a_group_sets_its_values() -> None:
    values = form.initial_values() | {"scheduler": "polynomial", "method.rank": "77"}
    changed = form.switch_file(values, "scheduler")
    assert changed["scheduler.minimum_rate"] == "1e-07"
    assert "scheduler.cycles" not in changed
    assert changed["method.rank"] == "77"


def test_a_saved_experiment_loads_unchanged(roots: Roots) -> None:
    values = typed(method="qlora", data__packing=True, accumulation="2", method__alpha="12.5")
    more = "checkpoint.save_best=true\n+data.columns.output=answer\n+method.rank_pattern.q_proj=16"
    found = form.check_form(values, more, roots)
    path = experiment.save(roots, "mine", found)
    back, lines = experiment.load(roots, "mine")
    again = form.check_form(back, lines, roots)
    assert again.config == found.config
    assert back[form.ACCUMULATION] == "2"
    assert "mine" in experiment.names(roots)
    assert yaml.safe_load(path.read_text())["defaults"][-1] == "_self_"
    with pytest.raises(UserError, match="exists"):
        experiment.save(roots, "mine", found)


def test_the_demo_experiment_loads(roots: Roots) -> None:
    values, more = experiment.load(roots, "demo")
    found = form.check_form(values, more, roots)
    assert found.config
    assert found.config.training.max_steps == 14
    assert values[form.ACCUMULATION] == "1"
    assert values["method.rank"] == "16"


@pytest.mark.parametrize("name", ["", "../x", "nothing", "a b"])
def test_a_missing_experiment_is_refused(roots: Roots, name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        experiment.load(roots, name)


def test_an_invalid_experiment_file_is_refused(roots: Roots) -> None:
    folder = roots.home / "experiments/experiment"
    folder.mkdir(parents=True)
    (folder / "list.yaml").write_text("- a\n")
    (folder / "broken.yaml").write_text("{")
    for name in ("list", "broken"):
        with pytest.raises(UserError, match="is not an experiment file"):
            experiment.load(roots, name)
