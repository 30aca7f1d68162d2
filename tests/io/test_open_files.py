"""The limit of open files is raised as far as it may be, and a limit that is too low is named."""

from __future__ import annotations

import resource

import pytest

from launcher.errors import UserError
from launcher.io import open_files

BILLION = 1 << 30


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limits of this process, the last entry; each call of setrlimit adds one."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: found.append(limit))
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, BILLION), (open_files.ENOUGH, BILLION)),
        ((1024, resource.RLIM_INFINITY), (open_files.ENOUGH, resource.RLIM_INFINITY)),
        ((BILLION, BILLION), (BILLION, BILLION)),
        ((resource.RLIM_INFINITY,) * 2, (resource.RLIM_INFINITY,) * 2),
    ],
)
def test_the_soft_limit_is_raised(
    limits: list[tuple[int, int]], before: tuple[int, int], after: tuple[int, int]
) -> None:
    limits.append(before)
    open_files.raise_limit(ranks=512, groups=2)
    assert limits[-1] == after


def test_a_hard_limit_below_the_sockets_of_the_ranks_is_refused(
    limits: list[tuple[int, int]],
) -> None:
    limits.append((1024, 1024))
    open_files.raise_limit(ranks=256)
    with pytest.raises(UserError, match=r"512 ranks need about 1,278 .* may open 1,024 .* nofile="):
        open_files.raise_limit(ranks=512)


def test_sockets_grow_with_ranks_and_groups() -> None:
    assert open_files.needed(512) == 2 * 511 + 256
    assert open_files.needed(512, groups=2) == 3 * 511 + 256
