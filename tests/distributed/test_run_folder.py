"""The agreement of all ranks on one run folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from launcher.distributed import rendezvous, run_folder
from launcher.errors import UserError
from launcher.folders.run import RunDir

MINUTES = 2 / 60


def agreement(world: int, prints: list[str], create: Callable[[], RunDir]) -> list[RunDir | str]:
    """What each rank gets: the folder, or the message of its refusal."""
    all_rounds = dist.HashStore()
    results: list[RunDir | str] = [""] * world

    def rank_of(rank: int) -> None:
        try:
            store = rendezvous.enter_round(all_rounds, rank, world, MINUTES)
            results[rank] = run_folder.agree_on_run(
                store, rank, world, prints[rank], create, True, MINUTES
            )
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(prints))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_ranks_use_the_folder_that_rank_0_makes(tmp_path: Path) -> None:
    made: list[RunDir] = []

    def create() -> RunDir:
        made.append(RunDir(tmp_path))
        return made[-1]

    results = agreement(3, ["a"] * 3, create)
    assert results == [RunDir(tmp_path)] * 3
    assert made == [RunDir(tmp_path)]


def test_one_differing_rank_fails_all_ranks_and_no_folder_is_made() -> None:
    made: list[RunDir] = []

    def create() -> RunDir:
        made.append(RunDir(Path()))
        return made[-1]

    results = agreement(3, ["a", "a", "b"], create)
    assert len(set(results)) == 1
    assert "rank 2 has composed a different configuration than rank 0" in str(results[0])
    assert not made


def test_all_ranks_report_a_folder_that_cannot_be_made() -> None:
    def create() -> RunDir:
        raise UserError("no room")

    assert agreement(2, ["a", "a"], create) == ["no room"] * 2


def test_a_folder_that_other_ranks_cannot_see_is_reported() -> None:
    results = agreement(2, ["a", "a"], lambda: RunDir(Path("/not/shared")))
    assert "every machine shares" in str(results[1])


def test_a_rank_that_never_connects_is_named() -> None:
    (result, _) = agreement(2, ["a"], lambda: RunDir(Path()))
    assert "no answer from rank 1" in str(result)


def test_a_restarted_round_sees_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank comes first, and whatever the ranks that were killed have written."""
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.05)
    left_by_killed = dist.HashStore()
    left_by_killed.set("shardway/round", "old")
    left_by_killed.set("old/1", "a rank that was killed before rank 0 answered")
    left_by_killed.set("old/2/b rank", "")
    seen: list[str] = []

    def rank_of(rank: int, delay: float, now: int) -> None:
        time.sleep(delay)
        store = rendezvous.enter_round(left_by_killed, rank, 3, 10 * MINUTES)
        if rank == 0:
            store.set("verdict", str(now))
        store.wait(["verdict"])
        seen.append(f"{now}: {store.get('verdict').decode()}")

    for now, delays in enumerate([(0.4, 0.0, 0.1), (0.0, 0.2, 0.4), (0.2, 0.0, 0.3)]):
        threads = [
            threading.Thread(target=rank_of, args=(rank, delay, now))
            for rank, delay in enumerate(delays)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [f"{now}: {now}" for now in range(3) for _ in range(3)]
