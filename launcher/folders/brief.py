"""Short text for values of files that are not trusted, and for many names.

`repr` writes a value once for each of its occurrences: forty nested pairs of one tuple are 2**40
texts. Imports no torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

LENGTH = 80
_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = LENGTH


def brief(value: Any) -> str:
    """At most `LENGTH` characters that show `value`, in bounded time."""
    return _repr.repr(value)[:LENGTH]


def listed(names: Sequence[str], count: int) -> str:
    """The first `count` names, with an ellipsis if there are more."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
