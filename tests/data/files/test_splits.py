"""A folder's split is chosen by the rules of `datasets`, and rows of other splits never train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from pyarrow import Table, parquet

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.data import source
from launcher.errors import UserError


def make(folder: Path, *names: str) -> Path:
    """A folder whose files each have one row, with the name of the file as its question."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"instruction": name, "output": "a"}]))
    return folder


def read(path: Path | str, **settings: Any) -> list[str]:
    """The questions of the rows."""
    chosen = SourceConfig(path=str(path), **settings)
    return [row["instruction"] for _, row in source.iter_rows(chosen, by_line=False)]


def read_evaluation(path: Path | str, **settings: Any) -> list[str]:
    config = DataConfig(path="train.jsonl", eval_path=str(path), **settings)
    rows = source.iter_rows(source.evaluation_config(config), by_line=False)
    return [row["instruction"] for _, row in rows]


def problem(path: Path | str, **settings: Any) -> str:
    (found,) = source.find_problems(DataConfig(path=str(path), **settings))
    return found


LAYOUTS = [
    ["train.json", "test.json"],
    ["train/a.json", "train/b.json", "validation/a.json"],
    ["data/train-00000-of-00002.json", "data/train-00001-of-00002.json",
     "data/test-00000-of-00001.json"],
    ["train-00000-of-00001.json", "dev-00000-of-00001.json"],
    ["my_dataset_test.json", "my_dataset_train.json"],
    ["training/a.json", "evaluation/a.json"],
    ["en/train.json", "de/train.json", "de/val.json"],
    ["train2.json", "test 1.json"],
    ["v1-train/a.json", "v1-valid/a.json"],
    ["train.json", "notes.json", "testing.json"],
]  # fmt: skip


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_splits_are_those_of_datasets(tmp_path: Path, names: list[str]) -> None:
    folder = make(tmp_path / "data_set", *names)
    expected = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert "train" in expected
    for split, rows in expected.items():
        assert sorted(read(folder, split=split)) == sorted(rows["instruction"])
    assert source.find_problems(DataConfig(path=str(folder))) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Train.json", "TEST.json"], ["Train.json"]),
        (["train_test_split/train.json", "train_test_split/test.json"],
         ["train_test_split/train.json"]),
        (["test_set_train.json", "test_set_dev.json"], ["test_set_train.json"]),
        (["train/unit_test.json", "dev/a.json"], ["train/unit_test.json"]),
        (["train/unit-test/a.json", "test/a.json"], ["train/unit-test/a.json"]),
        (["train/a.json", "more_train.json", "test.json"], ["more_train.json", "train/a.json"]),
        (["contest.json", "latest.json", "trainer.json"],
         ["contest.json", "latest.json", "trainer.json"]),
        (["data/part-00000-of-00002.json", "data/part-00001-of-00002.json"],
         ["data/part-00000-of-00002.json", "data/part-00001-of-00002.json"]),
    ],
)  # fmt: skip
def test_rows_of_other_splits_are_not_trained_on(
    tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    assert read(make(tmp_path, *names)) == expected


def test_an_ambiguous_name_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train.json", "train_test.json")
    assert "train_test.json fits the splits test, train → rename it" in problem(tmp_path)


def test_a_saved_dataset_dict(tmp_path: Path) -> None:
    rows = {name: Dataset.from_list([{"instruction": name, "output": "a"}]) for name in
            ("train", "test", "hard")}  # fmt: skip
    DatasetDict(rows).save_to_disk(tmp_path)
    (tmp_path / "train/cache-0123.arrow").write_bytes(b"no rows")
    assert [read(tmp_path, split=name) for name in rows] == [["train"], ["test"], ["hard"]]
    assert "its splits are train, test, hard" in problem(tmp_path, split="validation")
    assert read_evaluation(tmp_path) == ["test"]
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert "dataset_dict.json lists no splits" in problem(tmp_path)


def test_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nconfigs:\n")
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        table = Table.from_pylist([{"instruction": name, "output": "a"}])
        parquet.write_table(table, tmp_path / f"data/{name}-00000-of-00001.parquet")
    make(tmp_path, ".cache/train.json", "__pycache__/train.json", "dataset_infos.json")
    assert read(tmp_path) == ["train"]
    assert read(tmp_path, split="test") == ["test"]
    assert read(tmp_path / "data") == ["train"]


HEAD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/a*
  - split: held_out
    path: [en/b.json]
- config_name: de
  data_files: [de/*.json]
- config_name: fr
  data_dir: fr
- config_name: it
  data_files: {train: it, dev: "fr/**/test.json"}
---
"""


def test_configurations_of_a_readme(tmp_path: Path) -> None:
    make(tmp_path, "en/a1.json", "en/b.json", "de/a.json", "fr/train.json", "fr/test.json",
         "it/a.json")  # fmt: skip
    (tmp_path / "README.md").write_text(HEAD)
    assert "has several configurations: en, de, fr, it → data.subset=en" in problem(tmp_path)
    assert "data.subset=xx is not in" in problem(tmp_path, subset="xx")
    trained = {name: read(tmp_path, subset=name) for name in ("en", "de", "fr", "it")}
    assert trained == {
        "en": ["en/a1.json"], "de": ["de/a.json"], "fr": ["fr/train.json"], "it": ["it/a.json"]
    }  # fmt: skip
    assert read(tmp_path, subset="en", split="held_out") == ["en/b.json"]
    assert read(tmp_path, subset="it", split="validation") == ["fr/test.json"]
    assert "its splits are train → " in problem(tmp_path, subset="de", split="test")
    assert read_evaluation(tmp_path, subset="fr") == ["fr/test.json"]
    (tmp_path / "README.md").write_text(HEAD.replace("config_name: de", "config_name: default"))
    assert read(tmp_path) == ["de/a.json"]


@pytest.mark.parametrize(
    ("configs", "sentence"),
    [
        ("configs: [", "configs: is not a list of entries with config_name"),
        ("configs: x", "configs: is not a list of entries with config_name"),
        ("configs: [{config_name: a, data_files: 3}]", "data_files: is not globs"),
        ("configs: [{config_name: a, data_files: [{split: train}]}]", "data_files: is not globs"),
        ("configs: [{config_name: a, data_files: ../other/*}]", "lists ../other/*, which is not"),
        ("configs: [{config_name: a, data_files: /etc/*}]", "lists /etc/*, which is not in"),
        ("configs: [{config_name: a, data_dir: ..}]", "lists .., which is not in"),
        ("configs: [{config_name: a, data_files: 'hf://x/y'}]", "lists hf://x/y, which is not in"),
        ("configs: [{config_name: a, data_files: none*}]", "files of the split train are missing"),
    ],
)
def test_a_bad_readme_is_refused(tmp_path: Path, configs: str, sentence: str) -> None:
    make(tmp_path / "other", "train.json")
    make(tmp_path / "set", "train.json")
    (tmp_path / "set/README.md").write_text(f"---\n{configs}\n---\n")
    assert sentence in problem(tmp_path / "set")


def test_a_subset_without_a_readme_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "en/train.json", "en/test.json", "de/a.json")
    assert read(tmp_path, subset="en") == ["en/train.json"]
    assert read(tmp_path, subset="de") == ["de/a.json"]
    assert "data.subset, one of de, en" in problem(tmp_path, subset="fr")
    assert "one of de, en" in problem(tmp_path / "en/..", subset="..")


def test_files_and_globs_are_read_whole_and_have_no_splits(tmp_path: Path) -> None:
    make(tmp_path, "train.json", "test.json")
    assert read(f"{tmp_path}/*") == ["test.json", "train.json"]
    assert read(tmp_path / "test.json") == ["test.json"]
    for path in (tmp_path / "test.json", f"{tmp_path}/*"):
        assert problem(path, split="test").startswith("data.split=test chooses from a folder")
        assert problem(path, subset="en").startswith("data.subset=en chooses from a folder")


def test_a_split_of_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.json", "b.json")
    assert read(tmp_path) == ["a.json", "b.json"]
    assert "no file or folder in" in problem(tmp_path, split="test")
    several = {"a": {"path": str(tmp_path)}}
    found = source.find_problems(DataConfig(sources=several, split="test"))  # type: ignore[arg-type]
    assert found == ["data.split=test has no effect: each source has its own → remove data.split"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.json", "test.json", "dev.json"], ["dev.json"]),
        (["train.json", "test.json"], ["test.json"]),
        (["a.json", "b.json"], ["a.json", "b.json"]),
        (["train.json"], ["train.json"]),
    ],
)
def test_evaluation_rows_of_a_folder(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    assert read_evaluation(make(tmp_path, *names), split="train", subset="of_data_path") == expected


def test_evaluation_needs_a_split_for_it(tmp_path: Path) -> None:
    make(tmp_path, "data/train_a-00000-of-00001.json", "data/test_a-00000-of-00001.json")
    with pytest.raises(UserError, match="neither a validation nor a test split, but train_a, test"):
        read_evaluation(tmp_path)


def test_evaluation_rows_of_the_hub(tmp_path: Path) -> None:
    make(tmp_path, "train.json", "test.json")
    assert read_evaluation(f"hub:{tmp_path}") == ["test.json"]
    make(tmp_path, "validation.json")
    assert read_evaluation(f"hub:{tmp_path}") == ["validation.json"]


def test_the_content_is_that_of_the_split(tmp_path: Path) -> None:
    make(tmp_path, "train.json", "test.json")
    chosen = SourceConfig(path=str(tmp_path))
    before = [*source.iter_content(chosen)]
    make(tmp_path, "test.json", "validation.json")
    assert [*source.iter_content(chosen)] == before
    train = (tmp_path / "train.json").read_bytes()
    assert before == [f".json {len(train)}".encode(), train]


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train/a.json", "test/b.json", "more.json")
    (tmp_path / "scan.pdf").write_bytes(b"x")
    (tmp_path / "README.md").write_text("about")
    notes = [*source.file_notes(DataConfig(path=str(tmp_path)))]
    assert notes == [
        f"{tmp_path}: 1 file(s) of train are read, 2 file(s) (more.json, test/b.json) of other "
        "splits, or of none, are not",
        f"{tmp_path}: 1 file(s) (scan.pdf) of other types are not read",
    ]
    everything = f"{tmp_path}/**/*.json"
    assert [*source.file_notes(DataConfig(path=everything))] == []


def test_the_way_out_of_a_missing_split_reads_all_files(tmp_path: Path) -> None:
    make(tmp_path, "train/a.json", "test/b.json")
    assert f"data.path='{tmp_path}/**'" in problem(tmp_path, split="validation")
    assert read(f"{tmp_path}/**") == ["test/b.json", "train/a.json"]
    found = problem(f"{tmp_path}/*")
    assert "matches only folders" in found
    assert f"data.path='{tmp_path}/test/**'" in found
