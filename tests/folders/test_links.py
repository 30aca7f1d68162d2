"""Nothing in a folder is opened through a link that leads out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.folders import links
from launcher.folders.links import LeadsOut
from launcher.folders.run import RunDir


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/file").write_text("secret")
    return folder


@pytest.fixture
def folder(tmp_path: Path, outside: Path) -> Path:
    """A folder with a link of every sort."""
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (folder / "real/file").write_text("mine")
    for name, target in {
        "near": "real/file", "round": folder / "real", "loop": "loop2", "loop2": "loop",
        "nothing": "not there", "out": outside / "deep/file", "up": "../outside", "top": "/",
        "zero": "/dev/zero", "gone": "/not/there", "twice": "round/back", "real/back": "..",
        "real/far": outside, "hop": "out",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    return folder


@pytest.mark.parametrize(
    "name",
    ["real/file", "near", "round/file", "loop", "nothing", "real/back/real", "twice", "new/file",
     "real/../near", "."],
)  # fmt: skip
def test_links_that_stay_in_the_folder_are_followed(folder: Path, name: str) -> None:
    assert links.inside(folder, name) == folder / name
    (folder.parent / "latest").symlink_to(folder)
    assert links.inside(folder.parent / "latest", name), "the folder itself may be a link"


@pytest.mark.parametrize(
    ("name", "link"),
    [("out", "out"), ("up/deep/file", "up"), ("top", "top"), ("zero", "zero"), ("gone", "gone"),
     ("round/far/deep", "round/far"), ("hop", "hop"), ("..", ".."), ("real/../../x", "real/../.."),
     ("real/back/../outside", "real/back/.."), ("/etc/passwd", "/")],
)  # fmt: skip
def test_the_link_that_leads_out_is_named(folder: Path, name: str, link: str) -> None:
    with pytest.raises(LeadsOut, match=r"is a link that leads out of .*, to /.* → .*replace") as it:
        links.inside(folder, name)
    assert it.value.path == folder / link
    assert os.path.realpath(folder / link) in str(it.value)


def test_a_tree_is_searched_without_following_its_links(folder: Path, outside: Path) -> None:
    (outside / "deep/worse").symlink_to("/etc")
    with pytest.raises(LeadsOut):
        links.check_tree(folder)
    for path in ("out", "up", "top", "zero", "gone", "real/far", "hop"):
        (folder / path).unlink()
    links.check_tree(folder)
    (folder / "real/deeper").symlink_to("../../outside/deep")
    with pytest.raises(LeadsOut, match="real/deeper is a link"):
        links.check_tree(folder)


def test_a_snapshot_of_the_hub_consists_of_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots/0a1b/checkpoints/step-000001"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/1").write_text("weights")
    (snapshot / "file").symlink_to("../../../../blobs/1")
    links.check_tree(snapshot)
    (snapshot / "other").symlink_to("../../../../../elsewhere")
    with pytest.raises(LeadsOut, match="other is a link"):
        links.check_tree(snapshot)


def test_a_chain_of_thousands_of_links_is_refused(folder: Path) -> None:
    for number in range(3000):
        (folder / f"chain-{number}").symlink_to(f"chain-{number + 1}")
    with pytest.raises(LeadsOut, match="to more links than a system follows"):
        links.inside(folder, "chain-0")


NAMES = (
    "config", "launch", "metrics", "plot", "trackers", "engine_config", "stop", "logs", "status",
    "steps", "submitted", "job", "starting", "rendezvous", "console", "starter",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_run_leads_out_of_its_folder(tmp_path: Path, outside: Path, name: str) -> None:
    run = RunDir(tmp_path / "run")
    path: Path = getattr(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    with pytest.raises(LeadsOut):
        getattr(run, name)


def test_numbered_names_and_the_lock_of_a_run_do_not_lead_out(
    tmp_path: Path, outside: Path
) -> None:
    run = RunDir(tmp_path / "run")
    secret = outside / "deep/file"
    paths = [run.rank_log(0), run.rank_error(0), run.rank_process(0), run.agent_log(0)]
    paths += [run.job_console("7"), run.path / "logs/.lock"]
    run.logs.mkdir(parents=True)
    for path in paths:
        path.symlink_to(secret)
    with pytest.raises(LeadsOut), run.lock():
        pass
    for get in (run.rank_log, run.rank_error, run.rank_process, run.agent_log):
        with pytest.raises(LeadsOut):
            get(0)
    with pytest.raises(LeadsOut):
        run.job_console("7")
    (run.path / "logs/slurm-").mkdir()
    with pytest.raises(LeadsOut):
        run.job_console("/../../../outside/deep/file")
    with pytest.raises(LeadsOut):
        run.log_files("rank-*.log")
    assert secret.read_text() == "secret"


def test_checkpoints_and_export_may_be_on_another_disk(tmp_path: Path, outside: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.checkpoints.symlink_to(outside)
    run.export.symlink_to(outside)
    assert (run.checkpoints / "deep").is_dir()
    assert (run.export / "deep").is_dir()
