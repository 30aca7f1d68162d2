"""Bad input gets one clear error message and status 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import shardway, written

CASES = {
    "a misspelt key": (["method.rnk=3"], "method.rnk is not a setting; did you mean method.rank?"),
    "an added key": (["+method.typo=1"], "method.typo is not a setting"),
    "a misspelt section": (["trainig.seed=1"], "trainig is not a setting; did you mean training?"),
    "an unknown choice": (["strategy=fsdq"], "Could not find 'strategy/fsdq'"),
    "a wrong type": (["training.seed=x"], "training.seed=x: Value 'x'"),
    "a batch that does not divide": (
        ["training.global_batch_size=7", "cluster.nproc_per_node=2"],
        "training.global_batch_size=7 is not a multiple of 2 ranks",
    ),
    "a missing file": (["data.path=none.jsonl"], "data.path=none.jsonl cannot be read"),
    "an empty data set": (["data.path=DATA/empty.jsonl"], "contains no rows"),
    "a row without an answer": (
        ["data.path=DATA/silent.jsonl"],
        "silent.jsonl:2 has nothing to train on",
    ),
    "a model folder that is none": (["model.name_or_path=DATA"], "is not a model folder"),
    "a data set not named": (["data=alpaca"], "data.path=null: there are no rows to train on"),
    "an override that is none": (["training.seed"], "training.seed"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "empty.jsonl").write_text("\n")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    silent = {"messages": row["messages"][:1]}
    (folder / "silent.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(silent) + "\n")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_a_clear_message(
    tiny: Path, data: Path, tmp_path: Path, case: str
) -> None:
    overrides, sentence = CASES[case]
    words = [word.replace("DATA", str(data)) for word in overrides]
    done = shardway("train", "model=tiny", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert done.stdout == ""
    assert written(tmp_path) == []


def test_all_reasons_are_reported_at_once(tiny: Path, tmp_path: Path) -> None:
    done = shardway(
        *("train", "model=tiny", "model.name_or_path=/none", "data.path=none.jsonl"),
        *("training.max_steps=3", "training.epochs=2"),
        *("training.global_batch_size=7", "cluster.nproc_per_node=2"),
        cwd=tmp_path,
    )
    assert "for 4 reasons" in done.stderr
    assert written(tmp_path) == []


def test_an_existing_run_folder_is_not_touched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = shardway("train", "model=tiny", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "run_dir=run exists, and nothing is overwritten" in done.stderr
    assert written(tmp_path) == ["run"]


def test_one_bad_element_refuses_the_entire_sweep(tiny: Path, tmp_path: Path) -> None:
    done = shardway("train", "--multirun", "model=tiny", "method.rank=4,0", cwd=tmp_path)
    assert done.returncode == 2
    assert "method.rank=0 must be ≥ 1" in done.stderr
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "words", [["chat", "."], ["verify", "."], ["consolidate", ".", "--output", "x"], ["fly"]]
)
def test_other_verbs_refuse_with_one_line_and_status_2(tmp_path: Path, words: list[str]) -> None:
    done = shardway(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert written(tmp_path) == []
