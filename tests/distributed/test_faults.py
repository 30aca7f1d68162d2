"""Whatever damages a checkpoint or interrupts a save, training resumes from the last valid one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import load
from launcher.checkpoint.save import Saver
from launcher.config import Config
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.checkpoint import Checkpoint
from tests.helpers import checkpoints, faults, parts
from tests.helpers.checkpoints import six_steps
from tests.helpers.compose import composed
from tests.helpers.parts import Case
from tests.helpers.pool import RankPool

SAVES = (1, 2, 3)
Fault = tuple[int, str, str]  # rank, audit event, pattern of the path


@pytest.fixture
def mortals() -> Iterator[RankPool]:
    """Two ranks that only this test uses."""
    pool = RankPool(2, "forkserver")
    yield pool
    pool.close()


def train_and_save(
    rank_info: RankInfo,
    case: Case,
    folder: Path,
    fault: Fault | None = None,
    **options: Any,
) -> list[float]:
    """Losses of three steps, each with a save; `fault` kills a rank."""
    if fault and fault[0] == rank_info.rank:
        faults.die_at(*fault[1:])
    train_state, loader = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, case.config(), folder, **options)
    return [one_step(train_state, saver, loader, step) for step in SAVES]


def one_step(train_state: Any, saver: Saver, loader: Any, step: int) -> float:
    stats = parts.train_step(train_state.strategy, loader.step_batch(step - 1))
    train_state.scheduler.step()
    saver.save(step, 0, None)
    saver.finish()
    return train_state.strategy.sum(stats.loss).item()


def go_on(rank_info: RankInfo, case: Case, folder: Path) -> tuple[int, list[float], list[str]]:
    """A new attempt with resume=auto: the step it starts at, its losses, its log output."""
    config = dataclasses.replace(case.config(), resume="auto")
    train_state, loader = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, config, folder)
    said: list[str] = []
    chosen = load.choose_checkpoint(config, folder / "checkpoints", rank_info, said.append)
    done = load.restore(chosen, train_state, force=False).step if chosen else 0
    return done, [one_step(train_state, saver, loader, step) for step in SAVES[done:]], said


KILLS = {
    "before a file is written": ("full", (0, "os.mkdir", r"\.step-000002\.partial")),
    "in a shard": ("full", (1, "open", r"\.step-000002\.partial/model/__1_")),
    "between shards and their metadata": (
        "full",
        (0, "open", r"\.step-000002\.partial/model/\.metadata"),
    ),
    "at the random states": ("full", (0, "open", r"\.step-000002\.partial/rng")),
    "after the adapter": (
        "lora",
        (0, "open", r"\.step-000002\.partial/optimizer\.safetensors"),
    ),
    "before the manifest": ("lora", (0, "open", r"\.step-000002\.partial/\.manifest")),
    "before the name": ("lora", (0, "os.rename", r"\.step-000002\.partial$")),
    "before the old one is deleted": ("lora", (0, "shutil.rmtree", r"\.step-000001\.deleted")),
}


@pytest.mark.parametrize(
    ("kill", "async_save"),
    [
        pytest.param(kill, later, marks=() if (at + later) % 2 else pytest.mark.whole)
        for at, kill in enumerate(KILLS)
        for later in (False, True)
    ],
)
def test_a_killed_save_loses_only_that_save(
    ranks: Any, mortals: RankPool, tiny: Path, rows_file: Path, tmp_path: Path, kill: str,
    async_save: bool,
) -> None:  # fmt: skip
    method, fault = KILLS[kill]
    case = six_steps(tiny, rows_file, method, "fsdp")
    options = {"keep_last": 1, "async_save": async_save}
    whole = ranks.run(2, train_and_save, case, tmp_path / "whole", None, **options)[0]
    with pytest.raises(AssertionError, match=f"rank {fault[0]}:\ndied"):
        mortals.run(2, train_and_save, case, tmp_path / "run", fault, **options)
    done, losses, _ = ranks.run(2, go_on, case, tmp_path / "run")[0]
    assert done == (2 if "deleted" in fault[2] else 1)
    assert losses == whole[done:]
    left = {path.name for path in (tmp_path / "run/checkpoints").glob(".*")}
    assert not left, "nothing of what was begun is left"


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-3])
    return "bytes instead of"


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return "has changed since"


def remove(path: Path) -> str:
    path.unlink()
    return "is missing"


DAMAGES = [
    ("lora", "adapter/adapter_model.safetensors", flip),
    ("lora", "optimizer.safetensors", truncate),
    ("lora", "rng.safetensors", remove),
    ("lora", "trainer.json", flip),
    ("full", "model/.metadata", truncate),
    ("full", "model/__1_0.distcp", flip),
    ("full", "model/__0_0.distcp", remove),
]


def lose_the_configuration(rank_info: RankInfo, case: Case, folder: Path) -> list[float]:
    """As train_and_save; config.yaml of the run is lost after it has started."""
    train_state, loader = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, case.config(), folder, keep_last=2)
    (folder / "config.yaml").unlink()
    return [one_step(train_state, saver, loader, step) for step in SAVES]


def test_what_does_not_belong_there_does_not_end_a_live_run(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    stray = ("step-000001.bak", "step-abc", "step-000009 (copy)", "step-5", ".step-x.partial")
    for name in stray:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-000002").write_text("a file")
    (tmp_path / "checkpoints/step-000003").symlink_to(tmp_path / "nothing")
    (tmp_path / "checkpoints/.step-000003.partial").mkdir()
    case = six_steps(tiny, rows_file, "lora", "single")
    ranks.run(1, lose_the_configuration, case, tmp_path)
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    moved = {"step-000002", "step-000003", ".step-000003.partial"}
    assert found == {*stray, "step-000002", "step-000003", *(f"broken-1-{name}" for name in moved)}
    for step in (2, 3):
        saved = Checkpoint(tmp_path / f"checkpoints/step-{step:06d}")
        assert manifest.check(saved.manifest)["step"] == step
        assert saved.config.read_text().startswith("model:")


@pytest.mark.parametrize("change", [{"content": None}, {"step": "3"}, {"base": []}])
def test_a_manifest_of_wrong_types_is_named_and_the_previous_one_is_resumed(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    case = six_steps(tiny, rows_file, "lora", "single")
    whole = ranks.run(1, train_and_save, case, tmp_path)[0]
    file = tmp_path / "checkpoints/step-000003/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    done, losses, said = ranks.run(1, go_on, case, tmp_path)[0]
    assert (done, losses) == (2, whole[2:])
    assert said[0].startswith("step-000003 is broken and skipped: ")
    assert next(iter(change)) in said[0]


def test_a_run_whose_checkpoints_are_all_damaged_says_that_it_starts_again(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(tiny, rows_file, "lora", "single")
    ranks.run(1, train_and_save, case, tmp_path)
    for step in SAVES:
        truncate(tmp_path / f"checkpoints/step-{step:06d}/trainer.json")
    done, _, said = ranks.run(1, go_on, case, tmp_path)[0]
    assert done == 0
    assert len(said) == len(SAVES) + 1
    assert said[-1] == "no checkpoint is left to resume from: training starts at step 0"


@pytest.mark.parametrize(("method", "name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_resumed(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
    name: str,
    damage: Callable[[Path], str],
) -> None:
    case = six_steps(tiny, rows_file, method, "zero2" if method == "full" else "ddp")
    whole = ranks.run(2, train_and_save, case, tmp_path)[0]
    reason = damage(tmp_path / "checkpoints/step-000003" / name)
    done, losses, said = ranks.run(2, go_on, case, tmp_path)[0]
    assert (done, losses) == (2, whole[2:])
    (sentence,) = said
    assert sentence.startswith("step-000003 is broken and skipped: ")
    assert name in sentence
    assert reason in sentence


@pytest.mark.parametrize(
    ("content", "said_of_it"),
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ("{}", "is not a manifest"),
        ('{"files": 3}', "is not a manifest"),
    ],
)
def test_a_folder_without_a_manifest_is_not_a_checkpoint(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, content: str | None, said_of_it: str
) -> None:
    case = six_steps(tiny, rows_file, "lora", "single")
    whole = ranks.run(1, train_and_save, case, tmp_path)[0]
    file = tmp_path / "checkpoints/step-000003/manifest.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    done, losses, said = ranks.run(1, go_on, case, tmp_path)[0]
    assert (done, losses) == (2, whole[2:])
    assert f"manifest.json {said_of_it}" in said[0]
    assert json.loads(file.read_text())["step"] == 3, "the step was saved anew"
    assert (tmp_path / "checkpoints/broken-1-step-000003").is_dir()


def choose(rank_info: RankInfo, config: Config, folder: Path) -> str:
    """What a new run in `folder` resumes from, or why it does not."""
    try:
        chosen = load.choose_checkpoint(config, folder / "checkpoints", rank_info, print)
    except UserError as error:
        return str(error)
    return str(chosen and chosen.path)


@pytest.mark.parametrize("names_the_run", [True, False])
def test_a_broken_checkpoint_that_resume_names_is_refused_and_keeps_its_name(
    ranks: Any, tmp_path: Path, names_the_run: bool
) -> None:
    """It belongs to another run; a broken one of this run is renamed and skipped."""
    broken = Checkpoint(tmp_path / "other/checkpoints/step-000002")
    broken.path.mkdir(parents=True)
    (broken.path / "trainer.json").write_text("{}")
    broken.config.write_text("model: {}\n")
    manifest.write(broken.manifest, {"step": 2, "content": "all", "base": {}})
    reason = truncate(broken.path / "trainer.json")
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    named = tmp_path / "other" if names_the_run else broken.path
    before = sorted(tmp_path.rglob("*"))
    said = ranks.run(2, choose, composed(f"resume={named}"), tmp_path / "new")
    assert said[0] == said[1]
    assert f"resume={named} is broken: " in said[0]
    assert "trainer.json" in said[0]
    assert reason in said[0]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is renamed, nothing is made"


def fill_the_disk(rank_info: RankInfo, case: Case, disk: Path, check: bool, **options: Any) -> str:
    """Save once, fill the disk, save again; return the error."""
    train_state, loader = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, case.config(), disk / "run", **options)
    one_step(train_state, saver, loader, 1)
    if rank_info.is_main:
        faults.fill(disk, leave=200_000)
    if not check:  # the disk fills up between the check and the write
        saver._refuse_without_space = lambda nbytes: None  # type: ignore[method-assign]
    try:
        one_step(train_state, saver, loader, 2)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("check", [True, False], ids=["full before", "full meanwhile"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_all_ranks_report_a_full_disk_as_the_cause(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, check: bool,
    async_save: bool,
) -> None:  # fmt: skip
    case = six_steps(tiny, rows_file, "full", strategy)
    with faults.small_disk(tmp_path / "disk", "64m") as disk:
        said = ranks.run(2, fill_the_disk, case, disk, check, async_save=async_save)
        assert said[0] == said[1]
        cause = r"does not fit on the disk" if check else r"\(0\.\d MB free on its disk\)"
        assert re.search(cause, said[0])
        assert [p.name for p in (disk / "run/checkpoints").glob("step-*")] == ["step-000001"]
        (disk / "filler").unlink()
        done, _, _ = ranks.run(2, go_on, case, disk / "run")[0]
        assert done == 1
