"""Whatever happens to a checkpoint or in its making, training goes on from the last whole one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import load
from launcher.checkpoint.save import Saver
from launcher.config import store
from launcher.distributed.process_group import Place
from launcher.errors import UserError
from tests.config.test_schema import composed
from tests.distributed.test_resume import case_of
from tests.helpers import faults, parts
from tests.helpers.parts import Case
from tests.helpers.pool import RankPool

SAVES = (1, 2, 3)
Fault = tuple[int, str, str]  # rank, audit event, pattern of the path


@pytest.fixture
def mortals() -> Iterator[RankPool]:
    """Two ranks of this test's own."""
    pool = RankPool(2, "forkserver")
    yield pool
    pool.close()


def train_and_save(
    place: Place,
    case: Case,
    folder: Path,
    fault: Fault | None = None,
    **options: Any,
) -> list[float]:
    """Losses of three steps, each with a save; `fault` ends a rank."""
    if fault and fault[0] == place.rank:
        faults.die_at(*fault[1:])
    torch.manual_seed(7 + place.rank)
    strategy, method, loader = parts.set_up(place, case)
    learner = parts.learner(place, case, strategy, method)
    saver = parts.saver(learner, folder, **options)
    return [one_step(learner, saver, loader, step) for step in SAVES]


def one_step(learner: Any, saver: Saver, loader: Any, step: int) -> float:
    stats = parts.train_step(learner.strategy, loader.window(step - 1))
    learner.scheduler.step()
    saver.save(step, 0, None)
    saver.finish()
    return learner.strategy.sum(stats.loss).item()


def go_on(place: Place, case: Case, folder: Path) -> tuple[int, list[float], list[str]]:
    """As a new attempt with resume=auto: the step it begins at, its losses, what it said."""
    config = store.build({**composed(), "resume": "auto"})
    strategy, method, loader = parts.set_up(place, case)
    learner = parts.learner(place, case, strategy, method)
    saver = parts.saver(learner, folder)
    said: list[str] = []
    chosen = load.choose(config, folder / "checkpoints", place, said.append)
    done = load.restore(chosen, learner, force=False).step if chosen else 0
    return done, [one_step(learner, saver, loader, step) for step in SAVES[done:]], said


KILLS = {
    "before a file is written": ("full", (0, "os.mkdir", r"\.step-000002\.partial")),
    "in a shard": ("full", (1, "open", r"\.step-000002\.partial/model/__1_")),
    "between model and optimizer": ("full", (0, "open", r"\.step-000002\.partial/optimizer/")),
    "at the random states": ("full", (1, "open", r"\.step-000002\.partial/rng")),
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
def test_a_save_that_is_killed_costs_one_save(
    ranks: Any, mortals: RankPool, tiny: Path, rows_file: Path, tmp_path: Path, kill: str,
    async_save: bool,
) -> None:  # fmt: skip
    method, fault = KILLS[kill]
    case = case_of(tiny, rows_file, method, "fsdp")
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
    return "has another content"


def remove(path: Path) -> str:
    path.unlink()
    return "is missing"


DAMAGES = [
    ("lora", "adapter/adapter_model.safetensors", flip),
    ("lora", "optimizer.safetensors", truncate),
    ("lora", "rng/rank-01.safetensors", remove),
    ("lora", "trainer.json", flip),
    ("full", "model/.metadata", truncate),
    ("full", "model/__1_0.distcp", flip),
    ("full", "optimizer/__0_0.distcp", remove),
]


@pytest.mark.parametrize(("method", "name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
    name: str,
    damage: Callable[[Path], str],
) -> None:
    case = case_of(tiny, rows_file, method, "zero2" if method == "full" else "ddp")
    whole = ranks.run(2, train_and_save, case, tmp_path)[0]
    reason = damage(tmp_path / "checkpoints/step-000003" / name)
    done, losses, said = ranks.run(2, go_on, case, tmp_path)[0]
    assert (done, losses) == (2, whole[2:])
    (sentence,) = said
    assert sentence.startswith("step-000003 is broken and passed over: ")
    assert name in sentence
    assert reason in sentence


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": 3}'])
def test_a_folder_without_a_manifest_is_no_checkpoint(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, content: str | None
) -> None:
    case = case_of(tiny, rows_file, "lora", "single")
    whole = ranks.run(1, train_and_save, case, tmp_path)[0]
    manifest = tmp_path / "checkpoints/step-000003/manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    done, losses, said = ranks.run(1, go_on, case, tmp_path)[0]
    assert (done, losses) == (2, whole[2:])
    assert "manifest.json is no manifest" in said[0]
    assert json.loads(manifest.read_text())["step"] == 3, "the step was saved anew"
    assert (tmp_path / "checkpoints/broken-1-step-000003").is_dir()


def fill_the_disk(place: Place, case: Case, disk: Path, check: bool, **options: Any) -> str:
    """Save once, fill the disk, save again: the error."""
    strategy, method, loader = parts.set_up(place, case)
    learner = parts.learner(place, case, strategy, method)
    saver = parts.saver(learner, disk / "run", **options)
    one_step(learner, saver, loader, 1)
    if place.is_main:
        faults.fill(disk, leave=200_000)
    if not check:  # the disk fills up between the look at it and the writing
        saver._refuse_without_space = lambda nbytes: None  # type: ignore[method-assign]
    try:
        one_step(learner, saver, loader, 2)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("check", [True, False], ids=["full before", "full meanwhile"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_full_disk_is_the_cause_that_all_ranks_give(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, check: bool,
    async_save: bool,
) -> None:  # fmt: skip
    case = case_of(tiny, rows_file, "full", strategy)
    with faults.small_disk(tmp_path / "disk", "64m") as disk:
        said = ranks.run(2, fill_the_disk, case, disk, check, async_save=async_save)
        assert said[0] == said[1]
        cause = r"does not fit on the disk" if check else r"\(0\.\d MB free on its disk\)"
        assert re.search(cause, said[0])
        assert [p.name for p in (disk / "run/checkpoints").glob("step-*")] == ["step-000001"]
        (disk / "filler").unlink()
        done, _, _ = ranks.run(2, go_on, case, disk / "run")[0]
        assert done == 1
