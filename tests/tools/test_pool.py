"""The pool of ranks for distributed tests: a failure in one test does not affect the next."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from tests.helpers import pool as pools
from tests.helpers.pool import RankPool, message_of_error


def process_id(rank_info: RankInfo) -> int:
    return os.getpid()


def raise_on_rank_one(rank_info: RankInfo) -> None:
    assert rank_info.rank == 0, "as expected"


def die_on_rank_one(rank_info: RankInfo) -> None:
    if rank_info.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on_rank_one(rank_info: RankInfo) -> None:
    if rank_info.rank == 1:
        time.sleep(600)


def refuse(rank_info: RankInfo, word: str) -> None:
    raise UserError(f"{word} {rank_info.rank}")


FAULTS: dict[Callable[[RankInfo], None], str] = {
    raise_on_rank_one: r"^rank 1:\n.*as expected",
    die_on_rank_one: r"^rank 1:\ndied$",
    hang_on_rank_one: r"^rank 1 gave no answer in \d s$",
}


def test_ranks_are_reused_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RankPool(2, "forkserver", preloaded=["torch.distributed.tensor.debug"])
    used = pool.run(2, process_id)
    assert pool.run(2, message_of_error, refuse, "rank") == ["rank 0", "rank 1"]
    assert pool.run(1, process_id) == used[:1]
    for fault, message in FAULTS.items():
        with monkeypatch.context() as patch:
            if fault is hang_on_rank_one:
                patch.setattr(pools, "PATIENCE_SECONDS", 1)
            with pytest.raises(AssertionError, match=f"(?s){message}"):
                pool.run(2, fault)
        assert not any(map(psutil.pid_exists, used)), "a failed run ends its ranks"
        previous, used = used, pool.run(2, process_id)
        assert not set(used) & set(previous), "the next run has new ones"
    pool.close()
    assert not any(map(psutil.pid_exists, used))
