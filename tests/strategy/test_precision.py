"""The line of the log about dtypes."""

from __future__ import annotations

from launcher.strategy.precision import PRECISIONS


def test_only_what_there_is_has_a_dtype() -> None:
    bf16 = PRECISIONS["bf16"]
    assert bf16.describe(None, has_frozen=True, reduces=True).startswith("frozen weights: bfloat16")
    assert bf16.describe("int8", has_frozen=False, reduces=False) == (
        "trained weights: float32  compute: bfloat16  gradients: float32  optimizer state: int8"
    )
