"""Values of files are shown in bounded time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launcher.folders.brief import LENGTH, brief


@pytest.mark.parametrize("wrap", [lambda x: (x, x), lambda x: [x, x], lambda x: {"a": x, "b": x}])
def test_shared_values_are_not_written_again_and_again(wrap: Any) -> None:
    value: Any = ()
    for _ in range(60):
        value = wrap(value)
    started = time.process_time()
    assert 0 < len(brief(value)) <= LENGTH
    assert time.process_time() - started < 1


def test_a_short_value_is_shown_whole() -> None:
    assert brief({"a": [1, 2.5, None]}) == "{'a': [1, 2.5, None]}"
    assert len(brief("x" * 10**6)) == LENGTH
