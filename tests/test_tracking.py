"""Who watches a run, and the agreement on its folder."""

from __future__ import annotations

import importlib
import io
import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher import run_dir, versions
from launcher.cluster import command, devices
from launcher.config import store
from launcher.distributed import agree
from launcher.errors import UserError
from launcher.tracking.console import Progress
from launcher.tracking.plot import draw_loss
from tests.config.test_schema import composed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 99.0, **more}


def watched(console: io.StringIO) -> str:
    progress = Progress(console)
    progress.start(0, 3)
    for step in (1, 2, 3):
        progress.log([record(step)])
    progress.log([{"step": 3, "eval_loss": 1.25}])
    progress.finish()
    return console.getvalue()


def test_a_terminal_gets_a_bar_with_loss_rate_and_time_left() -> None:
    text = watched(Terminal())
    assert "3/3" in text
    assert "loss 2.5000" in text
    assert "99 tokens/s" in text
    assert "step 3: eval_loss 1.2500" in text


def test_elsewhere_plain_lines() -> None:
    text = watched(io.StringIO())
    assert "\r" not in text
    assert "step 3/3  loss 2.5000  rate 1.00e-04  99 tokens/s  0 s left" in text


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    lines = [json.dumps(record(step)) for step in range(1, 9)]
    lines.append(json.dumps({"step": 8, "eval_loss": 2.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_unnamed_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = store.build(composed())
    made = [run_dir.attempt(config, ["x"], 1)[0].path for _ in range(3)]
    assert len(set(made)) == 3
    assert {path.parent for path in made} == {tmp_path / "runs"}
    named = store.build({**composed(), "run_dir": str(made[0])})
    with pytest.raises(UserError, match="cannot be made: File exists"):
        run_dir.attempt(named, ["x"], 1)


def agreement(
    world: int, prints: list[str], create: Any, monkeypatch: pytest.MonkeyPatch
) -> list[Path | str]:
    """What each rank gets: the folder, or the sentence with which it refuses."""
    monkeypatch.setattr(agree, "PATIENCE", timedelta(seconds=2))
    store_, results = dist.HashStore(), [Path()] * world

    def rank_of(rank: int) -> None:
        try:
            results[rank] = agree.agree_on_run(store_, rank, world, prints[rank], create)
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(prints))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_agree_on_the_folder_that_rank_0_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    results = agreement(
        3, ["a"] * 3, lambda: made.append(1) or run_dir.RunDir(tmp_path), monkeypatch
    )
    assert results == [run_dir.RunDir(tmp_path)] * 3
    assert made == [1]


def test_one_that_differs_refuses_all_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    results = agreement(
        3, ["a", "a", "b"], lambda: made.append(1) or run_dir.RunDir(tmp_path), monkeypatch
    )
    assert len(set(results)) == 1
    assert "rank 2 composed another configuration than rank 0" in str(results[0])
    assert not made


def test_a_folder_that_cannot_be_made_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def create() -> run_dir.RunDir:
        raise UserError("no room")

    assert agreement(2, ["a", "a"], create, monkeypatch) == ["no room"] * 2


def test_a_folder_that_others_cannot_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    results = agreement(2, ["a", "a"], lambda: run_dir.RunDir(Path("/not/shared")), monkeypatch)
    assert "every machine shares" in str(results[1])


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (result, _) = agreement(2, ["a"], lambda: run_dir.RunDir(Path()), monkeypatch)
    assert "no word from rank 1" in str(result)


def test_versions_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.difference() is None, "the tests run on the tested versions"
    monkeypatch.setattr(versions, "tested", lambda: {**dict.fromkeys(versions.CHECKED, "0.1")})
    assert "torch 2.13" in (versions.difference() or "")


@pytest.mark.parametrize(("listed", "count"), [("0,1,3", 3), ("", 0), ("-1", 0), ("GPU-1a2b", 1)])
def test_visible_gpus_are_counted_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, listed: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert devices.visible_gpus() == count


def test_flash_attention_is_found_by_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (tmp_path / "flash_attn").mkdir()  # version 4 brings such a folder too
    assert not devices.has_flash_attention()
    installed = tmp_path / "flash_attn-2.8.3.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    importlib.invalidate_caches()
    assert devices.has_flash_attention()


def test_cores_are_shared_among_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert command.environment(2, gpus=0)["OMP_NUM_THREADS"] == "4"
    assert command.environment(16, gpus=0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert command.environment(2, gpus=0)["OMP_NUM_THREADS"] == "3"


def test_the_command_keeps_odd_paths_whole() -> None:
    argv = command.torchrun(Path("/runs/a b;c"), 1, 2)
    assert argv[-4:] == ["-m", "launcher.worker", "/runs/a b;c", "1"]
