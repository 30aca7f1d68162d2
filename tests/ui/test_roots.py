"""The paths that the page may read and write."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.errors import UserError
from launcher.folders import paths
from launcher.ui.roots import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    (tmp_path / "home").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    return Roots.of([tmp_path / "home"])


def test_a_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--root .*nowhere is not a folder"):
        Roots.of([tmp_path / "nowhere"])


def test_paths_inside_are_allowed_with_or_without_a_slash(roots: Roots) -> None:
    assert roots.to_write("runs/a") == roots.home / "runs/a"
    assert roots.to_write(roots.home / "runs/a") == roots.home / "runs/a"


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "runs/../../outside", "~root/.ssh"])
def test_paths_outside_are_refused(roots: Roots, path: str) -> None:
    with pytest.raises(UserError, match="is outside"):
        roots.to_read(path)


def test_a_link_to_the_outside_is_refused(roots: Roots) -> None:
    (roots.home / "link").symlink_to(roots.home.parent / "outside")
    with pytest.raises(UserError, match="is outside"):
        roots.to_read("link/rows.jsonl")


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-that-name/x"])
def test_an_invalid_path_is_refused(roots: Roots, path: str) -> None:
    with pytest.raises(UserError, match="is not a valid path"):
        roots.to_read(path)


def test_cache_and_package_are_readable_but_not_writable(roots: Roots) -> None:
    for path in (paths.cache() / "models/x", paths.bundled("demo/train.jsonl")):
        assert roots.to_read(path)
        with pytest.raises(UserError, match="is outside"):
            roots.to_write(path)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b/c", ".page", "a b", "x" * 101, "é"]
)
def test_invalid_run_names_are_refused(roots: Roots, name: str) -> None:
    with pytest.raises(UserError, match="is not a valid run name"):
        roots.run_folder(name)


def test_an_element_of_a_sweep_is_a_run(roots: Roots) -> None:
    assert roots.run_folder("sweep/0") == roots.runs / "sweep/0"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.name_or_path=/etc", "model.name_or_path"),
        ("model.name_or_path=../outside", "model.name_or_path"),
        ("data.path=/etc/passwd", "data.path"),
        ("data.eval_path=/etc/passwd", "data.eval_path"),
        ("data.dataset_info=/etc/passwd", "data.dataset_info"),
        ("data.template=/etc/x.jinja", "data.template"),
        ("'+data.sources={a:{path:/etc/passwd}}'", "data.sources.a.path"),
        ("method.adapter=/etc", "method.adapter"),
        ("method.merge_first=[/etc]", "method.merge_first"),
        ("resume=/etc", "resume"),
    ],
)
def test_every_path_in_a_configuration_is_checked(roots: Roots, override: str, key: str) -> None:
    config = compose([override.strip("'")])
    assert [refusal.split("=")[0] for refusal in roots.refusals(config)] == [key]


def test_a_path_to_write_is_checked(roots: Roots) -> None:
    config = compose(
        ["strategy=zero3_offload", "strategy.offload_param=nvme", "strategy.nvme_path=/etc"]
    )
    assert [refusal.split("=")[0] for refusal in roots.refusals(config)] == ["strategy.nvme_path"]


def test_the_defaults_and_hub_names_are_accepted(roots: Roots) -> None:
    config = compose(["model.name_or_path=owner/name", "data.path=hub:owner/name"])
    assert list(roots.refusals(config)) == list(roots.refusals_within(config)) == []
    assert list(roots.refusals(compose([]))) == []


def test_links_in_a_folder_and_names_in_a_list_are_followed(
    roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(roots.home)
    (roots.home / "rows").mkdir()
    (roots.home / "rows/a.jsonl").symlink_to(roots.home.parent / "outside/rows.jsonl")
    (roots.home / "info.json").write_text('{"a": {"file_name": "../outside/rows.jsonl"}}')
    for words in (
        ["data.path=rows"],
        ["data.path=rows/*.jsonl"],
        ["data.path=null", "data.dataset_info=info.json", "data.name=a"],
    ):
        (refusal,) = roots.refusals_within(compose(words))
        assert "is outside" in refusal
