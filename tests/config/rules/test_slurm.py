"""Time limits are parsed in the same way as by sbatch."""

from __future__ import annotations

import pytest

from launcher.config.rules.slurm import time_limit_seconds


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", None), ("90:30", 5430), ("1:30:05", 5405), ("1-12", 129600), ("1-12:30", 131400),
        ("2-0:0:1", 172801), ("UNLIMITED", float("inf")), ("4h", None),
        ("1:2:3:4", None), ("", None),
    ],
)  # fmt: skip
def test_a_time_limit_is_converted_to_seconds(limit: str, expected: float | None) -> None:
    """The formats are those of `--time` in sbatch(1)."""
    assert time_limit_seconds(limit) == expected
